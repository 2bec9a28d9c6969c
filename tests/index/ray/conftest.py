"""What two indexes of the same pictures have to have in common."""

import dataclasses

import pytest

from amg.index.change.contents import logs

TEXTS = ("meta.parquet", "pictures.parquet")  # their row groups are those of what was read at a time


@pytest.fixture
def alike():
    """Asserts that two indexes hold the same bytes, and say the same of every picture."""

    def assert_alike(found, expected):
        fields, other = (dataclasses.asdict(index.manifest) for index in (found, expected))
        files, others = fields.pop("files"), other.pop("files")
        assert fields == other and files.keys() == others.keys()
        for name in files.keys() - {*TEXTS}:
            assert files[name] == others[name], name
        assert found._meta == expected._meta
        one, two = (
            [line for log in logs(index.data) for line in log.to_pylist()] for index in (found, expected)
        )
        assert one == two

    return assert_alike
