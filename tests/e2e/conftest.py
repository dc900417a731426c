"""A bucket on a real S3 server, and the directories of one job."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.platform import Platform
from tests.s3_servers import S3Server


@pytest.fixture
def platform(rclone: S3Server, bucket: str, tmp_path: Path) -> Platform:
    # The image's user must be able to enter the directories above the job's own.
    for directory in (tmp_path, *tmp_path.parents):
        if directory.stat().st_mode & 0o005 != 0o005:
            directory.chmod(0o755)
    # rclone loses about one name in a thousand of those that several connections put at once into a
    # directory that is not there yet: it answers 404 for a file that is on its disk.
    (rclone.root / bucket / "out/t").mkdir(parents=True)
    return Platform(s3=rclone.boto3(), bucket=bucket, root=tmp_path, environ=dict(rclone.environ))
