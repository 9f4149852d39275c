"""The files for virtual machines: Ray's cluster launcher, and systemd."""

from __future__ import annotations

import configparser
import re

import jsonschema
import pytest
from files import DEPLOY, command, documents, image, pinned
from ray.autoscaler._private.util import prepare_config, validate_config

(CLUSTER,) = documents("vm/cluster.yaml")
WORKER, HEAD = CLUSTER["available_node_types"]["gpu"], CLUSTER["available_node_types"]["head"]


def unit(name: str) -> configparser.ConfigParser:
    """A systemd unit; nothing in these files is given twice."""
    parser = configparser.ConfigParser(interpolation=None, delimiters=("=",), comment_prefixes=("#",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(DEPLOY / "vm" / name)
    return parser


class TestCluster:
    """`deploy/vm/cluster.yaml`."""

    def test_rays_launcher_takes_it(self) -> None:
        validate_config(prepare_config(CLUSTER))
        with pytest.raises(jsonschema.ValidationError, match="idle_minutes"):
            validate_config(prepare_config({**CLUSTER, "idle_minutes": 5}))

    def test_it_costs_a_head_when_idle_and_gpus_only_while_there_is_work(self) -> None:
        assert (WORKER["min_workers"], WORKER["max_workers"]) == (0, CLUSTER["max_workers"])
        assert WORKER["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
        assert CLUSTER["idle_timeout_minutes"] <= 5
        assert CLUSTER["provider"]["cache_stopped_nodes"] is False
        assert HEAD["resources"] == {"CPU": 0, "GPU": 0}
        assert CLUSTER["head_node_type"] == "head"

    def test_the_image_and_the_versions_are_the_pinned_ones(self) -> None:
        assert CLUSTER["docker"]["image"] == image()
        (boto3,) = [re.search(r"boto3==(\S+)", each) for each in CLUSTER["head_setup_commands"]]
        assert boto3 is not None
        assert boto3[1] == pinned("botocore")

    def test_machines_have_roles_and_a_token_and_no_keys(self) -> None:
        profiles = [each["node_config"]["IamInstanceProfile"]["Name"] for each in (HEAD, WORKER)]
        assert len(set(profiles)) == 2, "the workers' role may not start machines"
        assert all(each["node_config"]["MetadataOptions"] == {"HttpTokens": "required"} for each in (HEAD, WORKER))
        assert CLUSTER["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
        starts = [CLUSTER[f"{kind}_start_ray_commands"][-1] for kind in ("head", "worker")]
        assert all("RAY_AUTH_MODE=token" in start.split() for start in starts)
        assert {"--dashboard-host=127.0.0.1", "--num-cpus=0", "--num-gpus=0"} <= set(starts[0].split())


class TestTimer:
    """`deploy/vm/pipeline.service` and `pipeline.timer`. `systemd-analyze verify` takes both."""

    def test_it_runs_a_config_every_night(self) -> None:
        service, timer = unit("pipeline.service")["Service"], unit("pipeline.timer")
        name, parameters = command(service["ExecStart"])
        assert (name, parameters["path"]) == ("run", "/etc/pipeline/config.yaml")
        assert service["Type"] == "oneshot"
        assert timer["Timer"]["OnCalendar"] == "*-*-* 02:00:00"
        assert timer["Install"]["WantedBy"] == "timers.target"
        hours = re.fullmatch(r"(\d+)h", service["TimeoutStartSec"])
        assert hours is not None and int(hours[1]) < 24

    def test_a_stop_reaches_the_driver_alone_and_leaves_it_time(self) -> None:
        service = unit("pipeline.service")["Service"]
        assert service["KillMode"] == "mixed"
        assert int(service["TimeoutStopSec"]) >= 30

    def test_it_may_do_what_it_needs_and_no_more(self) -> None:
        service = unit("pipeline.service")["Service"]
        assert service["User"] == "pipeline"
        assert service["ProtectSystem"] == "strict"
        hardening = "NoNewPrivileges ProtectHome PrivateTmp ProtectControlGroups ProtectKernelModules ProtectKernelTunables"
        assert {service[name] for name in [*hardening.split(), "RestrictSUIDSGID", "RestrictNamespaces"]} == {"yes"}
        assert service["CapabilityBoundingSet"] == ""
        assert service["StateDirectory"] == service["CacheDirectory"] == "pipeline", "all that it may write"
        assert service["EnvironmentFile"].startswith("-/etc/pipeline/")
        assert "AWS_" not in service["Environment"]
