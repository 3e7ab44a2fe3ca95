"""What Compose makes of the files: every container confined, every network as narrow as it can be."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml

import tunemill
from tunemill.image import IMAGES

from .conftest import ROOT, Lab

STAGES = ("fetch", "prepare", "train", "merge", "convert", "quantize", "infer", "evaluate", "store")
HELPERS = ("seed-secret", "seed-store")
EXTERNAL = {"STORE_ENDPOINT": "https://s3.example.org"}
COMBINATIONS = [
    pytest.param((), {}, id="bundled"),
    pytest.param(("cuda.yaml",), {}, id="cuda"),
    pytest.param(("external.yaml",), EXTERNAL, id="external"),
    pytest.param(("cuda.yaml", "external.yaml"), EXTERNAL, id="cuda-external"),
]

pytestmark = pytest.mark.usefixtures("client")


def configured(lab: Lab, overlays: tuple[str, ...] = (), **environment: str) -> Any:
    return json.loads(lab.config(*overlays, **environment))


@pytest.mark.parametrize(("overlays", "environment"), COMBINATIONS)
def test_every_container_is_confined(
    lab: Lab, overlays: tuple[str, ...], environment: dict[str, str]
) -> None:
    services = configured(lab, overlays, **environment)["services"]
    assert set(services) == {"s3", *STAGES, *HELPERS}
    for name, service in services.items():
        assert service["user"] == "65532:65532", name
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert not service.get("cap_add"), name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not service.get("privileged"), name


@pytest.mark.parametrize(("overlays", "environment"), COMBINATIONS)
def test_no_secret_is_in_the_files_or_the_environment(
    lab: Lab, overlays: tuple[str, ...], environment: dict[str, str]
) -> None:
    assert lab.run("secrets.sh").returncode == 0
    keys = re.findall(r"= (\w+)", (lab.folder / "secrets/credentials").read_text())
    given = environment | {
        "AWS_ACCESS_KEY_ID": "visible",
        "AWS_SECRET_ACCESS_KEY": "visible",
        "HF_TOKEN": "visible",
    }
    shown = lab.config(*overlays, **given)
    assert len(keys) == 2
    assert not any(key in shown for key in [*keys, "visible"])


def test_stages_reach_the_store_alone_and_two_of_them_a_hub(lab: Lab) -> None:
    config = configured(lab)
    assert config["networks"]["store"]["internal"] is True
    for name in STAGES:
        expected = {"store", "hub"} if name in ("fetch", "prepare") else {"store"}
        assert set(config["services"][name]["networks"]) == expected, name
        assert "ports" not in config["services"][name]
    for name in HELPERS:
        assert config["services"][name]["network_mode"] == "none"


def test_the_server_is_published_on_loopback_only(lab: Lab) -> None:
    server = configured(lab, STORE_PORT="7171")["services"]["s3"]
    assert [(port["host_ip"], port["published"], port["target"]) for port in server["ports"]] == [
        ("127.0.0.1", "7171", 7070)
    ]
    assert set(server["networks"]) == {"store", "published"}
    assert re.search(r":v[\d.]+@sha256:[0-9a-f]{64}$", server["image"])
    assert server["healthcheck"]["test"]
    assert "profiles" not in server


def test_a_store_of_ones_own_gets_a_way_out_and_leaves_the_bundled_one_alone(lab: Lab) -> None:
    bundled = configured(lab)
    external = configured(lab, ("external.yaml",), **EXTERNAL)
    assert not external["networks"]["store"].get("internal")
    assert external["networks"]["store"]["name"] != bundled["networks"]["store"]["name"]
    assert external["volumes"]["credentials"]["name"] != bundled["volumes"]["credentials"]["name"]
    environment = external["services"]["train"]["environment"]
    assert environment["AWS_ENDPOINT_URL_S3"] == "https://s3.example.org"


def test_what_a_stage_may_write(lab: Lab) -> None:
    for name in STAGES:
        service = configured(lab, TUNEMILL_FILES="/somewhere")["services"][name]
        mounts = {mount["target"]: mount for mount in service["volumes"]}
        assert set(mounts) == {"/work", "/run/secrets", "/files"}
        assert not mounts["/work"].get("read_only")
        assert mounts["/run/secrets"]["read_only"] is True
        assert mounts["/files"]["read_only"] is True
        assert mounts["/files"]["source"] == "/somewhere"
        assert service["working_dir"] == "/files"
        assert service["tmpfs"] == ["/tmp"]


def test_training_gets_time_to_save_and_limits_can_be_set(lab: Lab) -> None:
    services = configured(lab, PIDS_LIMIT="99", MEMORY_LIMIT="3g")["services"]
    assert services["train"]["stop_grace_period"] == "2m0s"
    assert {services[name]["pids_limit"] for name in STAGES} == {99}
    assert {services[name]["mem_limit"] for name in STAGES} == {str(3 << 30)}


def test_the_gpu_goes_to_the_stages_that_use_one(lab: Lab) -> None:
    services = configured(lab, ("cuda.yaml",))["services"]
    with_gpu = {name for name, service in services.items() if "reservations" in str(service.get("deploy"))}
    assert with_gpu == {"train", "quantize", "infer"}
    assert {services[name]["image"] for name in with_gpu} == {
        f"tunemill/{name}:{tunemill.__version__}-cuda" for name in with_gpu
    }
    (device,) = services["train"]["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])


def test_images_are_those_that_hold_the_stages_and_no_public_registry_s(lab: Lab) -> None:
    services = configured(lab)["services"]
    for name in STAGES:
        assert services[name]["image"] == f"tunemill/{IMAGES.get(name, name)}:{tunemill.__version__}"
        assert services[name]["pull_policy"] == "never"
    elsewhere = configured(lab, REGISTRY="registry.example.org/lab", TAG="x")["services"]
    assert elsewhere["merge"]["image"] == "registry.example.org/lab/merge:x"


def test_stages_start_only_when_they_are_named() -> None:
    services = yaml.safe_load((ROOT / "compose/compose.yaml").read_text())["services"]
    assert {name for name, service in services.items() if "profiles" not in service} == {"s3"}
