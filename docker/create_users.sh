#!/bin/sh
# Makes users in the S3 gateway, or gives those that are there their secret anew. For each NAME on the command line, the
# user's name is in NAME_S3_ACCESS_KEY and the secret in NAME_S3_SECRET_KEY. The ADMIN_ variables say where, and as whom.
set -eu
for name in "$@"; do
    eval "user=\$${name}_S3_ACCESS_KEY secret=\$${name}_S3_SECRET_KEY"
    versitygw admin create-user --access "$user" --secret "$secret" --role user ||
        versitygw admin update-user --access "$user" --secret "$secret"
done
