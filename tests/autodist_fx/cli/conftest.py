"""Models on disk that the tests of the command line share."""

import shutil

import pytest

from tests.support.checkpoint import save_tiny


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def config_only(llama, tmp_path_factory):
    directory = tmp_path_factory.mktemp("config")
    shutil.copy(llama / "config.json", directory)
    return directory
