"""What infra/ hands to docker, Kubernetes and Prefect, checked without any of the three running.

Two packages see more than these checks do and are used where they are installed: check-jsonschema, which brings the
Compose specification's schema along, and kubernetes-validate, which brings those of Kubernetes.
"""

import asyncio
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from jsonschema import Draft7Validator, ValidationError
from prefect.server.schemas.actions import DeploymentUpdate, WorkPoolCreate
from prefect.utilities.schema_tools import is_valid_schema, validate
from prefect.workers.process import ProcessJobConfiguration
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[3]
INFRA = ROOT / "infra"
COMPOSE_FILE = INFRA / "compose" / "compose.yaml"
MANIFESTS = sorted(INFRA.glob("kubernetes/*.yaml"))
POOLS = ["process", "docker", "kubernetes"]
IMAGE = "rlhf-pipeline:0.1.0"

SECRET = re.compile(r"PASSWORD|SECRET|ACCESS_KEY|AUTH")
TAG = re.compile(r"v?\d+\.\d+(\.\d+)?(-[a-z0-9.-]+)?")
DIGEST = "@sha256:[0-9a-f]{64}"
INTERPOLATION = re.compile(r"\$\{(\w+)(:[?-])?([^}]*)\}")


def documents(path: Path) -> list[Any]:
    return list(YAML(typ="safe").load_all(path))


COMPOSE: dict[str, Any] = documents(COMPOSE_FILE)[0]
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OBJECTS: list[dict[str, Any]] = [item for path in MANIFESTS for item in documents(path)]
DOCKERFILE = re.sub(r"^#.*\n", "", (INFRA / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
DOCKERFILE = re.sub(r"\\\s*", " ", DOCKERFILE)


def pool(kind: str) -> Any:
    return json.loads((INFRA / "work_pools" / f"{kind}.json").read_text(encoding="utf-8"))


def defaults(kind: str) -> dict[str, Any]:
    properties = pool(kind)["variables"]["properties"]
    return {name: entry["default"] for name, entry in properties.items() if "default" in entry}


def job(configuration: Any, kind: str, values: dict[str, Any]) -> Any:
    """What a worker makes of the template. No template names a block, so the client, a server's, is never asked."""
    return asyncio.run(configuration.from_template_and_values(pool(kind), values, client=Mock(spec=[])))


def the(kind: str, name: str) -> dict[str, Any]:
    [found] = [item for item in OBJECTS if item["kind"] == kind and item["metadata"]["name"] == name]
    return found


def texts(value: object) -> Iterator[str]:
    """Every string inside."""
    if isinstance(value, str):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else []:
        yield from texts(item)


# -- compose ---------------------------------------------------------------------------------------------------


def test_compose_follows_the_specification() -> None:
    vendored = pytest.importorskip("check_jsonschema", reason="it brings the schema")
    folder = Path(vendored.__file__).parent / "builtin_schemas" / "vendor"
    schema = json.loads((folder / "compose-spec.json").read_text(encoding="utf-8"))
    assert [f"{list(error.path)}: {error.message}" for error in Draft7Validator(schema).iter_errors(COMPOSE)] == []


def test_compose_has_the_standing_servers() -> None:
    assert set(SERVICES) == {"postgres", "s3", "mlflow", "prefect", "worker"}


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_pinned_restarted_watched_and_open_to_this_machine_alone(name: str) -> None:
    service = SERVICES[name]
    name_and_tag, *digest = re.split(f"(?={DIGEST})", service["image"])
    assert TAG.fullmatch(name_and_tag.rpartition(":")[2]), f"{service['image']}: name an exact version"
    assert digest or service["image"] == IMAGE, f"{service['image']}: add the digest of the tag, @sha256:…"
    assert service["restart"] == "unless-stopped"
    assert {"test", "interval", "timeout", "retries"} <= set(service["healthcheck"])
    assert service["healthcheck"]["test"][0] == "CMD"
    for port in service.get("ports", []):
        assert port.startswith("127.0.0.1:"), f"{name} publishes {port} to the whole network"


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_waits_until_what_it_needs_is_healthy(name: str) -> None:
    needs = SERVICES[name].get("depends_on", {})
    assert all(entry == {"condition": "service_healthy"} for entry in needs.values())
    spoken_to = re.findall(r"(?://|@)([a-z0-9]+):\d", "\n".join(texts(SERVICES[name]["environment"])))
    assert set(spoken_to) & set(SERVICES) <= {*needs, name}, "its environment names a service that it does not wait for"


@pytest.mark.parametrize("name", SERVICES)
def test_secrets_come_from_the_environment_and_none_may_be_missing(name: str) -> None:
    for key, value in SERVICES[name]["environment"].items():
        if SECRET.search(key):
            found = INTERPOLATION.fullmatch(value)
            assert found, f"{name} has a value for {key} written down"
        assert not re.search(r"://[^/@$]+:[^@$]+@", str(value)), f"{name}: {key} has a password written down"


def test_compose_says_which_secret_is_missing() -> None:
    used = INTERPOLATION.findall(COMPOSE_FILE.read_text(encoding="utf-8"))
    for variable, operator, message in used:
        if SECRET.search(variable) or variable.startswith("S3_"):
            assert operator == ":?", f"{variable} may be empty, and nobody is told"
            assert message.startswith(f"set {variable}, ")
        else:
            assert operator == ":-", f"{variable} is no secret and needs a default"
    example = (INFRA / "compose" / ".env.example").read_text(encoding="utf-8")
    offered = dict(re.findall(r"^(?:# )?([A-Z0-9_]+)=(.*)$", example, re.MULTILINE))
    assert set(offered) == {variable for variable, _, _ in used}, ".env.example names other variables"
    assert not any(value for name, value in offered.items() if SECRET.search(name)), ".env.example holds a secret"


def test_git_and_docker_leave_the_secrets_file_alone() -> None:
    ignored = subprocess.run(["git", "check-ignore", "--quiet", "infra/compose/.env"], cwd=ROOT, check=False)
    assert ignored.returncode == 0
    assert "**/.env" in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()


def test_data_lie_in_named_volumes() -> None:
    volumes = [volume.split(":") for service in SERVICES.values() for volume in service.get("volumes", [])]
    for source, *_ in volumes:
        assert source in COMPOSE["volumes"] or (COMPOSE_FILE.parent / source).is_file(), source
    targets = {target for _, target, *_ in volumes}
    assert {"/var/lib/postgresql/data", "/data/rlhf-mlflow", "/data/rlhf-dvc", "/var/cache/rlhf"} <= targets


@pytest.mark.parametrize("name", ["mlflow", "prefect", "worker"])
def test_our_servers_run_our_image_without_telemetry(name: str) -> None:
    service = SERVICES[name]
    assert service["image"] == IMAGE
    assert (COMPOSE_FILE.parent / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    quiet = {"DO_NOT_TRACK": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    assert quiet.items() <= service["environment"].items()


def test_mlflow_and_prefect_have_a_database_each() -> None:
    script = (INFRA / "compose" / "databases.sh").read_text(encoding="utf-8")
    made = set(re.findall(r"^create (\w+)", script, re.MULTILINE))
    variables = {"mlflow": "MLFLOW_BACKEND_STORE_URI", "prefect": "PREFECT_API_DATABASE_CONNECTION_URL"}
    assert made == set(variables)
    for name, variable in variables.items():
        url = SERVICES[name]["environment"][variable]
        assert re.fullmatch(rf"postgresql\+\w+://{name}:.*@postgres:5432/{name}", url)


def test_mlflow_answers_under_the_name_that_others_call_it_by() -> None:
    host = SERVICES["worker"]["environment"]["MLFLOW_TRACKING_URI"].removeprefix("http://")
    assert host in SERVICES["mlflow"]["environment"]["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")


def read(path: str) -> list[str]:
    return (ROOT / path).read_text(encoding="utf-8").splitlines()


# -- image -----------------------------------------------------------------------------------------------------


def test_the_image_is_pinned_not_root_and_holds_no_secret() -> None:
    [base] = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    assert re.fullmatch(r"python:3\.11\.\d+-slim-[a-z]+" + DIGEST, base)
    assert re.findall(r"^USER (.+)$", DOCKERFILE, re.MULTILINE) == ["1000:1000"]
    assert "--uid 1000" in DOCKERFILE
    given = re.findall(r"^(?:ARG|ENV) (.+)$", DOCKERFILE, re.MULTILINE)
    assert not [line for line in given if SECRET.search(line)]
    assert not re.search(r"https?://[^\s/]*@", DOCKERFILE)


def test_the_image_installs_the_locks_by_hash_and_what_the_code_judge_needs() -> None:
    copied = dict(re.findall(r"^COPY (\S+) (/tmp/\S+)$", DOCKERFILE, re.MULTILINE))
    [script] = re.findall(r"^RUN TORCH=\"\$TORCH\" (.*?) &&", DOCKERFILE, re.MULTILINE)
    assert script.strip() == "/tmp/rlhf/scripts/install.sh infra/locks/extras.lock infra/locks/servers.lock"
    assert copied == {
        "requirements.lock": "/tmp/rlhf/",
        "infra/locks": "/tmp/rlhf/infra/locks",
        "scripts/install.sh": "/tmp/rlhf/scripts/",
    }, "where the script looks for them"
    assert re.findall(r"pip install (.*)", DOCKERFILE) == ["--no-deps --no-build-isolation --editable /srv/rlhf"]
    assert re.findall(r"^ARG TORCH=(\w+)$", DOCKERFILE, re.MULTILINE) == ["cpu"]
    [packages] = re.findall(r"apt-get install --yes --no-install-recommends (.*?) &&", DOCKERFILE)
    assert set(packages.split()) == {"bubblewrap", "git", "libseccomp2"}
    locks = ["requirements.lock", *script.split()[1:]]
    locked = {line.partition("==")[0] for lock in locks for line in read(lock)}
    assert {
        "asyncpg",
        "boto3",
        "dvc-s3",
        "prefect-docker",
        "prefect-kubernetes",
        "psycopg2-binary",
        "pyseccomp",
    } <= locked


def test_what_git_ignores_stays_out_of_the_image() -> None:
    left_out = set((ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines())
    lines = [*(ROOT / ".gitignore").read_text(encoding="utf-8").splitlines(), "/.git"]
    lines += [f"/.dvc{line}" for line in (ROOT / ".dvc" / ".gitignore").read_text(encoding="utf-8").splitlines()]
    for line in filter(None, lines):
        name = line.strip("/")
        assert {name, f"**/{name}"} & left_out, f".dockerignore lets {line} into the image"


# -- Kubernetes ------------------------------------------------------------------------------------------------


def test_kubernetes_accepts_the_manifests() -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="it brings the schemas")
    for item in OBJECTS:
        if item["kind"] != "Kustomization":
            validator.validate(item, "1.33", strict=True)


def test_the_kustomization_lists_every_manifest_and_all_lies_in_one_namespace() -> None:
    [kustomization] = [item for item in OBJECTS if item["kind"] == "Kustomization"]
    assert {*kustomization["resources"], "kustomization.yaml"} == {path.name for path in MANIFESTS}
    assert kustomization["images"] == [{"name": IMAGE.split(":")[0], "newTag": IMAGE.split(":")[1]}]
    for item in OBJECTS:
        if item["kind"] not in {"Kustomization", "Namespace"}:
            assert item["metadata"].get("namespace") == the("Namespace", "rlhf")["metadata"]["name"]


def test_no_secret_is_written_into_a_manifest() -> None:
    assert not [item for item in OBJECTS if item["kind"] == "Secret"], "refer to a Secret that people make themselves"
    [worker] = the("Deployment", "rlhf-worker")["spec"]["template"]["spec"]["containers"]
    for entry in worker["env"]:
        if SECRET.search(entry["name"]) and not re.search(r"SECRET_(NAME|KEY)$", entry["name"]):
            assert set(entry) == {"name", "valueFrom"}, f"{entry['name']} is written down"
            assert entry["valueFrom"]["secretKeyRef"]["name"] == "rlhf-secrets"


def test_the_worker_is_pinned_bounded_watched_and_not_root() -> None:
    pod = the("Deployment", "rlhf-worker")["spec"]["template"]["spec"]
    [worker] = pod["containers"]
    assert worker["image"] == IMAGE
    assert {"cpu", "memory"} <= set(worker["resources"]["requests"])
    assert "memory" in worker["resources"]["limits"]
    assert worker["startupProbe"]["httpGet"]["path"] == worker["livenessProbe"]["httpGet"]["path"] == "/health"
    assert "--with-healthcheck" in worker["args"], "the probes ask a server that is off"
    assert pod["securityContext"]["runAsNonRoot"]


def test_the_worker_may_start_jobs_and_read_pods_and_no_more() -> None:
    binding = the("RoleBinding", "rlhf-worker")
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "rlhf-worker", "namespace": "rlhf"}]
    assert the("Deployment", "rlhf-worker")["spec"]["template"]["spec"]["serviceAccountName"] == "rlhf-worker"
    role = the("Role", binding["roleRef"]["name"])
    rules = {name: set(rule["verbs"]) for rule in role["rules"] for name in rule["resources"]}
    look = {"get", "list", "watch"}
    assert rules.pop("jobs") == look | {"create", "patch", "delete"}
    assert rules == dict.fromkeys(["pods", "pods/log", "pods/status", "events"], look)


# -- work pools ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", POOLS)
def test_prefect_accepts_the_template_and_every_variable_is_used(kind: str) -> None:
    """What the server does at `prefect work-pool create --base-job-template`."""
    WorkPoolCreate(name="rlhf", type=kind, base_job_template=pool(kind))
    schema = pool(kind)["variables"]
    is_valid_schema(schema, preprocess=False)
    options = dict.fromkeys(["raise_on_error", "preprocess", "ignore_required", "allow_none_with_default"], True)
    validate(defaults(kind), schema, **options)
    used = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(pool(kind)["job_configuration"])))
    assert used == set(schema["properties"])


@pytest.mark.parametrize("kind", POOLS)
def test_a_job_is_given_no_secret_by_its_pool(kind: str) -> None:
    environment = defaults(kind)["env"]
    assert environment.items() >= {"DO_NOT_TRACK": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}.items()
    for name, value in environment.items():
        assert not SECRET.search(name) or value == f"{{{{ ${name} }}}}", f"{name} is stored with the pool"


def test_a_process_job_gets_the_environment_of_its_pool() -> None:
    made = job(ProcessJobConfiguration, "process", {"env": {"MORE": "1"}})
    assert made.env == {"DO_NOT_TRACK": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "MORE": "1"}


def test_a_docker_job_meets_the_servers_of_compose() -> None:
    given = defaults("docker")
    assert given["image"] == IMAGE
    assert given["networks"] == [COMPOSE["networks"]["default"]["name"]]
    assert given["volumes"] == [f"{COMPOSE['volumes']['cache']['name']}:/var/cache/rlhf"]
    worker = SERVICES["worker"]["environment"]
    for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION"):
        assert given["env"][name] == worker[name]


def test_a_job_can_ask_for_gpus_and_asks_for_none_by_default() -> None:
    gpus = [{"count": -1, "capabilities": [["gpu"]]}]
    DeploymentUpdate(job_variables={"device_requests": gpus}).check_valid_configuration(pool("docker"))
    assert defaults("docker")["device_requests"] == []
    assert pool("docker")["job_configuration"]["container_create_kwargs"]["device_requests"] == "{{ device_requests }}"
    template = pool("kubernetes")
    DeploymentUpdate(job_variables={"gpu_limit": 1}).check_valid_configuration(template)
    with pytest.raises(ValidationError):
        DeploymentUpdate(job_variables={"gpu_limit": 0}).check_valid_configuration(template)
    [container] = template["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "{{ gpu_limit }}"
    assert defaults("kubernetes")["gpu_limit"] is None


def test_a_kubernetes_job_finds_what_the_manifests_make() -> None:
    given = defaults("kubernetes")
    pod = pool("kubernetes")["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    assert given["image"] == IMAGE
    assert the("ServiceAccount", given["service_account_name"])["metadata"]["namespace"] == given["namespace"]
    assert the("PersistentVolumeClaim", given["cache_claim"])
    assert pod["containers"][0]["envFrom"] == [{"secretRef": {"name": "{{ secret_name }}"}}]
    assert given["secret_name"] == "rlhf-secrets"
    mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts == {"cache": "/var/cache/rlhf", "shm": "/dev/shm"}
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["automountServiceAccountToken"] is False


@pytest.mark.parametrize("gpus", [None, 1])
def test_the_job_that_a_kubernetes_worker_makes_is_valid(gpus: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker's own code fills in the template; Kubernetes' own schema judges the result."""
    validator = pytest.importorskip("kubernetes_validate", reason="it brings the schemas")
    worker = pytest.importorskip("prefect_kubernetes.worker", reason="it fills in the template")
    values = {} if gpus is None else {"gpu_limit": gpus}
    made = job(worker.KubernetesWorkerJobConfiguration, "kubernetes", values)
    made._populate_env_in_manifest()
    made._populate_command_if_not_present()
    manifest = json.loads(json.dumps(made.job_manifest))
    manifest["metadata"].pop("generateName", None)
    manifest["metadata"]["name"] = "job"
    pod = manifest["spec"]["template"]["spec"]
    for misplaced in ("parallelism", "completions"):  # Prefect demands them there, Kubernetes drops them
        del pod[misplaced]
    validator.validate(manifest, "1.33", strict=True)
    expected = {"memory": "16Gi"} if gpus is None else {"memory": "16Gi", "nvidia.com/gpu": 1}
    assert pod["containers"][0]["resources"]["limits"] == expected


def test_the_database_script_parses() -> None:
    script = INFRA / "compose" / "databases.sh"
    assert os.access(script, os.X_OK), "PostgreSQL's image would source it into its own shell"
    assert subprocess.run(["sh", "-n", script], check=False).returncode == 0
