"""Provide one two-node cluster, one checkout and one undisturbed run for all tests in this folder."""

import shutil
import tempfile
from pathlib import Path

import pytest
from local_cluster import LocalCluster, why_not
from site_of_tests import make_site


def pytest_collection_modifyitems(items):
    reason = why_not()
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cluster)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def site():
    # not pytest's folder: munge refuses a socket with a long path
    folder = Path(tempfile.mkdtemp(prefix="zerotune-cluster-"))
    with LocalCluster(folder / "slurm") as cluster:
        yield make_site(cluster, folder / "checkout")
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def cluster(site):
    return site.cluster


@pytest.fixture(scope="session")
def undisturbed(site):
    """Return the run that all others are compared with: one process, never disturbed."""
    return site.launch_of("undisturbed", site.train("undisturbed", nodes=1).wait())
