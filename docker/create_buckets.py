"""Creates buckets in the store that the AWS_ variables describe, unless they exist, and admits their users.

Usage: create_buckets.py BUCKET[:USER] ...     USER may list, read, write and delete its objects, and nothing else
"""

import json
import sys

import boto3

# What DVC and MLflow do with objects. Not among it: to change who may.
ON_OBJECTS = ("GetObject", "PutObject", "DeleteObject", "AbortMultipartUpload", "ListMultipartUploadParts")
store = boto3.client("s3")
existing = {bucket["Name"] for bucket in store.list_buckets()["Buckets"]}
for argument in sys.argv[1:]:
    name, _, user = argument.partition(":")
    if name not in existing:
        store.create_bucket(Bucket=name)
    if user:
        bucket = f"arn:aws:s3:::{name}"
        allowed = {
            bucket: ["s3:ListBucket", "s3:ListBucketMultipartUploads"],
            f"{bucket}/*": [f"s3:{action}" for action in ON_OBJECTS],
        }
        statements = [
            {"Effect": "Allow", "Principal": {"AWS": [user]}, "Action": actions, "Resource": [resource]}
            for resource, actions in allowed.items()
        ]
        store.put_bucket_policy(Bucket=name, Policy=json.dumps({"Version": "2012-10-17", "Statement": statements}))
