"""The manifests before public checks: the schemas of Kubernetes, strictly, and checkov. And that these can fail."""

import copy
import json
import re

import pytest
import yaml

from testkit.manifests import VARIANTS, tool

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


def _validate(*paths):
    return tool("kubernetes-validate", "--strict", *paths)


def _checkov(*paths):
    files = [argument for path in paths for argument in ("-f", path)]
    done = tool("checkov", *files, "--framework", "kubernetes", "--compact", "--skip-download", "-o", "json")
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def test_every_overlay_fits_the_schemas_strictly(render):
    done = _validate(*(render(variant).path for variant in VARIANTS))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("terminationGracePeriodSeconds:", "terminationGraceSeconds:"),  # a name that no field has
        ("automountServiceAccountToken: false", "automountServiceAccountToken: nope"),  # a value of another type
        ("failureThreshold: 6", "failureTreshold: 6"),
    ],
)
def test_a_broken_manifest_is_refused(render, tmp_path, old, new):
    text = render("dev").path.read_text()
    assert old in text
    broken = tmp_path / "broken.yaml"
    broken.write_text(text.replace(old, new, 1))
    assert _validate(broken).returncode != 0


def test_checkov_finds_nothing_that_is_not_kept_with_a_reason(render):
    report = _checkov(*(render(variant).path for variant in VARIANTS))
    failed = [(c["check_id"], c["resource"]) for c in report["results"]["failed_checks"]]
    assert failed == []
    assert report["summary"]["passed"] > 1000
    kept = {(c["check_id"], c["check_result"]["suppress_comment"]) for c in report["results"]["skipped_checks"]}
    assert {check for check, _ in kept} == {"CKV_K8S_35", "CKV_K8S_43", "CKV_K8S_15"}
    assert all(len(reason) > 20 for _, reason in kept)


def test_prod_names_every_image_by_its_digest(render):
    for variant in ("prod", "prod+gpu"):
        for name, spec in render(variant).workloads():
            for container in [*spec["containers"], *spec.get("initContainers", [])]:
                assert re.fullmatch(
                    r"registry\.example\.com/pressroom/[a-z]+@sha256:[0-9a-f]{64}", container["image"]
                ), name


def test_checkov_would_find_a_container_that_runs_as_root(render, tmp_path):
    pod = copy.deepcopy(render("prod").named("StatefulSet", "gateway"))
    pod["spec"]["template"]["spec"]["securityContext"] = {"runAsUser": 0}
    pod["spec"]["template"]["spec"]["containers"][0]["securityContext"]["privileged"] = True
    bad = tmp_path / "bad.yaml"
    bad.write_text(yaml.safe_dump(pod))
    found = {c["check_id"] for c in _checkov(bad)["results"]["failed_checks"]}
    assert {"CKV_K8S_16", "CKV_K8S_23"} <= found
