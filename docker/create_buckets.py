"""Creates buckets in the store that the AWS_ variables describe, unless they exist, and admits their users.

Usage: create_buckets.py BUCKET[:USER] ...     USER may do everything in the bucket, and nothing in others
"""

import json
import sys

import boto3

store = boto3.client("s3")
existing = {bucket["Name"] for bucket in store.list_buckets()["Buckets"]}
for argument in sys.argv[1:]:
    name, _, user = argument.partition(":")
    if name not in existing:
        store.create_bucket(Bucket=name)
    if user:
        resources = [f"arn:aws:s3:::{name}", f"arn:aws:s3:::{name}/*"]
        statement = {"Effect": "Allow", "Principal": {"AWS": [user]}, "Action": "s3:*", "Resource": resources}
        policy = {"Version": "2012-10-17", "Statement": [statement]}
        store.put_bucket_policy(Bucket=name, Policy=json.dumps(policy))
