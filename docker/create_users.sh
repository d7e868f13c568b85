#!/bin/sh
# Makes the users named on the command line in the S3 gateway, or gives those that are there their secret anew.
# The secret of NAME is in the variable NAME_S3_SECRET_KEY, in capitals.
set -eu
for name in "$@"; do
    eval "secret=\$$(echo "$name" | tr '[:lower:]-' '[:upper:]_')_S3_SECRET_KEY"
    as_admin() {
        versitygw admin --access "$ADMIN_ACCESS_KEY_ID" --secret "$ADMIN_SECRET_ACCESS_KEY" \
            --endpoint-url "$ADMIN_ENDPOINT_URL" "$@"
    }
    as_admin create-user --access "$name" --secret "$secret" --role user ||
        as_admin update-user --access "$name" --secret "$secret"
done
