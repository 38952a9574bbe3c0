"""`deploy/k8s/new-worker` adds a worker service to an overlay, as narrow and as watched as those that come with Taskmesh."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import yaml

from flows import Network, pods_of
from manifests import CHECKS, Check, Documents, each_worker_scales_by_its_own_queue, named, of_kind
from taskmesh.topology import permissions, setup_permissions

from .conftest import K8S, kustomize
from .test_network_flows import places
from .test_schemas import VERSIONS, against_kubernetes, against_operators, is_built_in, write
from .test_secret_keys import made_keys, read_keys

NEW = ("greetings-worker", "greetings-relay", "greetings-setup")


@pytest.fixture
def manifests(tmp_path: Path) -> Path:
    """A copy of the manifests, to be added to."""
    return Path(shutil.copytree(K8S, tmp_path / "deploy" / "k8s"))


def run(manifests: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, manifests / "new-worker", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture(scope="module")
def with_a_worker(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Documents]:
    """Renders a copy of an overlay to which a worker service was added, once for all tests; each gets its own copy."""

    @cache
    def add(overlay: str) -> Documents:
        manifests = Path(shutil.copytree(K8S, tmp_path_factory.mktemp(overlay) / "deploy" / "k8s"))
        shutil.copytree(manifests / "overlays" / overlay, manifests / "overlays" / "acme")
        assert run(manifests, "acme", "greetings").returncode == 0
        answer = kustomize(manifests / "overlays" / "acme")
        assert answer.stderr == ""
        return [each for each in yaml.load_all(answer.stdout, yaml.CSafeLoader) if each]

    return lambda overlay: copy.deepcopy(add(overlay))


@pytest.mark.parametrize("overlay", ["staging", "production"])
def test_everything_that_was_there_stays_as_it_is(with_a_worker, render, overlay):
    documents = with_a_worker(overlay)

    assert [each for each in documents if "greetings" not in each["metadata"]["name"]] == render(overlay)


def test_nothing_of_the_service_that_it_is_modelled_on_is_left(with_a_worker):
    new = [each for each in with_a_worker("production") if "greetings" in each["metadata"]["name"]]

    assert len(new) > 30
    assert not [each["metadata"]["name"] for each in new if "billing" in str(each) or "TASKMESH_SELLER" in str(each)]


@pytest.mark.parametrize("overlay", ["staging", "production"])
@pytest.mark.parametrize("check", [each for each in CHECKS.values() if each is not each_worker_scales_by_its_own_queue])
def test_it_is_held_to_the_checks_of_every_other_service(with_a_worker, overlay: str, check: Check):
    assert check(with_a_worker(overlay)) == []


def test_kubernetes_takes_its_built_in_kinds(with_a_worker):
    documents = [each for each in with_a_worker("production") if "greetings" in each["metadata"]["name"]]

    assert against_kubernetes([each for each in documents if is_built_in(each)], *VERSIONS) == ""


def test_the_operators_take_their_kinds_of_it(with_a_worker, tmp_path):
    documents = [each for each in with_a_worker("production") if "greetings" in each["metadata"]["name"]]

    assert against_operators(write(tmp_path, [each for each in documents if not is_built_in(each)])) == ""


def test_it_is_scaled_by_its_own_queue_and_its_own_work(with_a_worker):
    scaled = named(with_a_worker("production"), "ScaledObject", "greetings-worker")["spec"]
    queue, work = (trigger["metadata"] for trigger in scaled["triggers"])

    assert scaled["scaleTargetRef"] == {"name": "greetings-worker"}
    assert (queue["queueName"], queue["vhostName"]) == ("greetings", "taskmesh")
    assert work["url"] == "http://gateway.taskmesh.svc/v1/services/greetings/outstanding"


@pytest.mark.parametrize("overlay", ["staging", "production"])
def test_its_secrets_are_those_that_it_reads(with_a_worker, overlay):
    documents = with_a_worker(overlay)

    assert made_keys(documents) == read_keys(documents)


def test_its_broker_users_have_the_rights_that_the_library_gives_them(with_a_worker):
    documents = with_a_worker("production")

    for user, given in (("greetings", permissions("greetings")), ("greetings-setup", setup_permissions("greetings"))):
        found = named(documents, "Permission", user)["spec"]["permissions"]
        assert found == {"configure": given.configure, "write": given.write, "read": given.read}
        topics = {
            (it["permissions"]["exchange"], it["permissions"]["write"], it["permissions"]["read"])
            for it in (each["spec"] for each in of_kind(documents, "TopicPermission"))
            if it["userReference"]["name"] == user
        }
        assert topics == {(topic.exchange, topic.write, topic.read) for topic in given.topics}


def test_it_reaches_the_broker_and_its_own_database_alone(with_a_worker):
    documents = with_a_worker("production")
    network, everywhere = Network(documents), places(documents)
    new = {place.name: place for place in pods_of(documents, "Deployment", "Job") if place.name in NEW}
    databases = {name: place for name, place in everywhere.items() if name.endswith("-db")}
    own = type(databases["billing-db"])(
        "greetings-db", "taskmesh", {"cnpg.io/cluster": "greetings-db"}, databases["billing-db"].namespace_labels
    )

    assert new.keys() == set(NEW)
    for place in new.values():
        assert network.lets(place, own, 5432)
        assert network.lets(place, everywhere["rabbitmq"], 5671)
        assert not [name for name, database in databases.items() if network.lets(place, database, 5432)]
        assert not network.lets(place, everywhere["internet"], 443)
        assert network.lets(everywhere["prometheus"], place, 9464)
        assert network.lets(place, everywhere["otel-gateway"], 4318)


def test_a_managed_data_plane_is_open_to_it(with_a_worker):
    policy = named(with_a_worker("staging"), "NetworkPolicy", "greetings-worker")["spec"]

    assert {"ipBlock": {"cidr": "10.20.0.0/16"}} in [peer for rule in policy["egress"] for peer in rule["to"]]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "deploy/k8s/new-worker acme greetings"),
        (("nowhere", "greetings"), "there is no overlay nowhere"),
        (("production", "Greetings_2"), "a service is called by one word"),
    ],
)
def test_what_it_cannot_do_it_says(manifests, words, said):
    answer = run(manifests, *words)

    assert answer.returncode != 0
    assert said in answer.stderr


def test_what_has_become_yours_is_not_written_over(manifests):
    run(manifests, "production", "greetings")

    answer = run(manifests, "production", "greetings")

    assert answer.returncode != 0
    assert "is there already, and yours" in answer.stderr
