"""A bucket on a real S3 server, and the directories of one job."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config

from tests.e2e.platform import Platform


@pytest.fixture(scope="session")
def s3_environ(rclone: Any) -> dict[str, str]:
    return {
        "AWS_S3_ENDPOINT_URL": rclone.url,
        "AWS_ACCESS_KEY_ID": rclone.access_key,
        "AWS_SECRET_ACCESS_KEY": rclone.secret_key,
        "AWS_DEFAULT_REGION": "eu-central-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@pytest.fixture
def platform(
    s3_environ: dict[str, str], tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Platform]:
    s3 = boto3.client(
        "s3",
        endpoint_url=s3_environ["AWS_S3_ENDPOINT_URL"],
        aws_access_key_id=s3_environ["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=s3_environ["AWS_SECRET_ACCESS_KEY"],
        region_name="eu-central-1",
        config=Config(request_checksum_calculation="when_required"),
    )
    bucket = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower()).strip("-")[:60] + "-b"
    s3.create_bucket(Bucket=bucket)
    # The image's user must be able to enter the directories above the job's own.
    for directory in (tmp_path, *tmp_path.parents[:2]):
        directory.chmod(0o755)
    yield Platform(s3=s3, bucket=bucket, root=tmp_path, environ=dict(s3_environ))
    s3.close()
