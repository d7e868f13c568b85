"""Creates the buckets named on the command line, in the store that the AWS_ variables describe, unless they exist."""

import sys

import boto3

store = boto3.client("s3")
existing = {bucket["Name"] for bucket in store.list_buckets()["Buckets"]}
for name in set(sys.argv[1:]) - existing:
    store.create_bucket(Bucket=name)
