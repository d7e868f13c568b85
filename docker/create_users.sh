#!/bin/sh
# Makes users in the S3 gateway, or gives those that are there their secret anew. For each NAME on the command line, the
# user's name is in NAME_S3_ACCESS_KEY and the secret in NAME_S3_SECRET_KEY.
set -eu
as_admin() {
    versitygw admin --access "$ADMIN_ACCESS_KEY_ID" --secret "$ADMIN_SECRET_ACCESS_KEY" \
        --endpoint-url "$ADMIN_ENDPOINT_URL" "$@"
}
for name in "$@"; do
    eval "user=\$${name}_S3_ACCESS_KEY secret=\$${name}_S3_SECRET_KEY"
    as_admin create-user --access "$user" --secret "$secret" --role user ||
        as_admin update-user --access "$user" --secret "$secret"
done
