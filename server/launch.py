"""Starting a steered server: everything that can be wrong is found before vLLM loads a model.

The launcher parses the flags, reads and compiles the policies, and only then hands over to vLLM's
own ``serve``, in this process. What it has decided reaches the processes that vLLM starts by the
environment (:mod:`server.settings`, :mod:`steering.engine.settings`).

If the server cannot start, or an API process finds that steering does not work, the reason is the
last thing said on standard error, and the exit code is not 0.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import traceback
from argparse import Namespace
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Final

from directions.card import ModelFingerprint
from directions.errors import TrimtabError
from directions.progress import Progress, silent
from server import plugin_list, vllm_command
from server.catalogue import OFF, Catalogue, Entry
from server.settings import Settings
from steering.engine.settings import MAX_READINGS, SITE_NAMES, EngineSettings
from steering.engine.touchpoints import ALLOW_UNCHECKED, check_version

if TYPE_CHECKING:
    from steering.plan import Plan
    from steering.readings import Reading

LOCAL: Final = "127.0.0.1"

_UNSUPPORTED: Final[tuple[tuple[str, str], ...]] = (
    ("grpc", "its requests pass no HTTP layer that could select or report a policy"),
    ("grpc_port", "it needs vLLM's Rust front end, which does not load Trimtab"),
    (
        "headless",
        "this process would have no API server to activate policies and prove that they work",
    ),
    (
        "data_parallel_multi_port_external_lb",
        "it starts servers of its own that Trimtab does not reach; start one trimtab serve a rank",
    ),
    ("tokens_only", "its answers have no place for the report of what was applied"),
)


@dataclass(frozen=True)
class Options:
    """Trimtab's own flags.

    Attributes:
        policies: folder of policies; None serves none.
        default_policy: policy of requests that select none; None or ``off`` steers none of them.
        probes: probes that read all traffic, whatever its policy.
        engine: sizes and sites of the engine's side.
        relative_ceiling: largest strength in units of a layer's mean activation norm.
        max_body_bytes: longest request body that is read.
        auto_sites: hook the sites that the policies need, whatever ``engine`` says.
        thinking: the texts that begin and end the model's thinking; None: told from the checkpoint.
    """

    policies: Path | None
    default_policy: str | None
    engine: EngineSettings
    relative_ceiling: float
    max_body_bytes: int
    auto_sites: bool = True
    thinking: tuple[str, str] | None = None
    probes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prepared:
    """A server that is ready to be handed to vLLM.

    Attributes:
        args: vLLM's arguments.
        catalogue: the policies.
        url: where clients find the server.
        engine: sizes and sites of the engine's side, as the policies need them.
        thinking: the texts that begin and end the model's thinking, where they are known.
        unchecked: the version of a vLLM that Trimtab was not checked with, which was asked for.
    """

    args: Namespace
    catalogue: Catalogue
    url: str
    engine: EngineSettings
    thinking: tuple[str, str] | None = None
    unchecked: str | None = None

    @property
    def names(self) -> list[str]:
        """The model's served names."""
        return list(self.args.served_model_name or [self.args.model])


def set_environment(engine: EngineSettings, *, allow_unchecked_vllm: bool = False) -> None:
    """Set what vLLM reads from the environment; to be done before vLLM is imported.

    Args:
        engine: sizes and sites of the engine's side.
        allow_unchecked_vllm: run with a vLLM of a release that Trimtab was not checked with.

    Raises:
        TrimtabError: ``E_SERVE_UNSUPPORTED`` for a variable that Trimtab cannot work with,
            ``E_PLUGIN_ABSENT`` if Trimtab's entry points are not installed.
    """
    if os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"):
        raise TrimtabError(
            "E_SERVE_UNSUPPORTED",
            "vLLM's Rust front end does not load Trimtab, so nothing would be steered; unset it",
            field="VLLM_USE_RUST_FRONTEND",
        )
    for group in ("vllm.general_plugins", plugin_list.ENDPOINT_GROUP):
        points = entry_points(group=group, name=plugin_list.NAME)
        if not points:
            raise TrimtabError(
                "E_PLUGIN_ABSENT",
                f"the installation has no entry point {plugin_list.NAME!r} in {group}; "
                "install the trimtab distribution again",
            )
    os.environ.update(engine.to_environment())
    if allow_unchecked_vllm:
        os.environ[ALLOW_UNCHECKED] = "1"
    os.environ[plugin_list.VARIABLE] = plugin_list.plugin_list(os.environ)
    # As vLLM's own command line sets it: forked workers break some accelerators.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    # A server that reports to its makers should be somebody's choice.
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # When vLLM's processes end, Python's resource tracker cleans up after them and says so on
    # standard error, where the last thing said is to be the reason why a server ended.
    filters = [f for f in (os.environ.get("PYTHONWARNINGS"), "ignore:resource_tracker") if f]
    os.environ["PYTHONWARNINGS"] = ",".join(filters)


def prepare(
    options: Options,
    arguments: Sequence[str],
    own_flags: Sequence[str] = (),
    progress: Progress = silent,
) -> Prepared:
    """Parse vLLM's arguments and compile the policies for the model they name.

    Raises:
        TrimtabError: ``E_OPTION``, ``E_SERVE_UNSUPPORTED``, ``E_MODEL_…``, ``E_POLICY_UNKNOWN`` for a
            default policy that is not served, ``E_VLLM_VERSION``, ``E_SITES`` for a policy that acts
            on a site that is left out, ``E_ARTEFACT_…``, ``E_PROBE_MODEL`` or ``E_PROBES`` for the
            probes; PolicyErrors with every fault of the policies.
    """
    from steering.policy_files import load_policies
    from steering.readings import compile_readings, tell_apart

    # Quick, and most often what is wrong; importing vLLM takes seconds.
    policies = load_policies(options.policies) if options.policies is not None else {}
    _check_there(options.probes)
    default = options.default_policy or OFF
    if default != OFF and default not in policies:
        raise TrimtabError(
            "E_POLICY_UNKNOWN",
            f"the default policy {default!r} is not among the policies",
            field="--default-policy",
            expected=", ".join([*policies, OFF]),
        )
    # vLLM loads the plug-in while it parses, and would only log that the plug-in refuses.
    unchecked = check_version()
    args = vllm_command.parse(arguments, own_flags)
    _refuse_unsupported(args)
    if args.host is None and not args.uds:
        args.host = LOCAL
    entries = []
    plans: dict[str, Plan] = {}
    thinking = options.thinking
    probes: tuple[Reading, ...] = ()
    if policies or options.probes:
        from directions.store import Store
        from steering.policy_files import compile_policies

        store = Store()
        template = _given_template(args)
        model = _fingerprint(args, template, progress)
        thinking = thinking or _markers(args, template)
        plans = compile_policies(
            policies,
            store,
            model,
            relative_ceiling=options.relative_ceiling,
            thinking=thinking,
        )
        probes = compile_readings(options.probes, store, model)
        named = {
            name: compile_readings(policy.probes, store, model, field=name)
            for name, policy in policies.items()
        }
        by_id = tell_apart([*probes, *(r for found in named.values() for r in found)])
        probes = tuple(by_id[reading.id] for reading in probes)
        entries = [
            Entry(policy, plans[name], tuple(by_id[reading.id] for reading in named[name]))
            for name, policy in policies.items()
        ]
    catalogue = Catalogue.of(entries, default=default, probes=probes)
    readings = catalogue.readings
    if len(readings) > MAX_READINGS:
        raise TrimtabError(
            "E_PROBES",
            f"{len(readings)} outputs of probes are to be read",
            field="--probe",
            expected=f"at most {MAX_READINGS}, those that policies name included",
        )
    layers = tuple(sorted({reading.layer for reading in readings}))
    engine = replace(options.engine, probe_layers=layers)
    if options.auto_sites:
        engine = replace(engine, sites=needed_sites(plans.values(), readings))
    _refuse_left_out(plans, readings, engine)
    return Prepared(args, catalogue, _url(args), engine, thinking, unchecked)


def _check_there(probes: Iterable[str]) -> None:
    """Refuse probes that the store does not have, before anything slow begins."""
    from directions.store import Store

    for reference in probes:
        try:
            Store().load_probe(reference)
        except TrimtabError as error:
            message = f"{reference}: {error.message}"
            raise TrimtabError(
                error.code, message, field="--probe", expected=error.expected
            ) from error


def needed_sites(plans: Iterable[Plan], readings: Collection[Reading] = ()) -> tuple[str, ...]:
    """The sites that plans and probes act on or read, of :data:`steering.engine.settings.SITE_NAMES`.

    Additions to the stream are always among them: the start-up proof is made of those.
    """
    found = {"add"}
    for plan in plans:
        found |= {"heads"} & plan.kinds | {p.site for row in plan.rows for p in row.projections}
        if plan.gates:
            found.add("gates")
    if readings:
        found.add("probes")
    return tuple(site for site in SITE_NAMES if site in found)


def _refuse_left_out(
    plans: Mapping[str, Plan], readings: Collection[Reading], engine: EngineSettings
) -> None:
    for name, plan in plans.items():
        missing = [site for site in needed_sites([plan]) if site not in engine.sites]
        if missing:
            raise TrimtabError(
                "E_SITES",
                f"policy {name} needs {' and '.join(missing)}, which --steering-sites leaves out",
                field="--steering-sites",
                expected=", ".join(needed_sites(plans.values(), readings)),
            )
    if readings and "probes" not in engine.sites:
        raise TrimtabError(
            "E_SITES",
            "there are probes to read, and --steering-sites leaves out probes",
            field="--steering-sites",
            expected=", ".join(needed_sites(plans.values(), readings)),
        )


def serve(prepared: Prepared, max_body_bytes: int) -> None:
    """Hand over to vLLM until the server ends.

    Raises:
        TrimtabError: the reason why the server could not start, or why it ended on its own.
    """
    # Again, as the policies have had their say on what is hooked.
    os.environ.update(prepared.engine.to_environment())
    with _settings(prepared, max_body_bytes) as settings:
        try:
            vllm_command.run(prepared.args)
        except TrimtabError:
            raise
        except Exception as error:
            # An API process of its own can only leave word; its exception ends there.
            recorded = settings.recorded_failure()
            if recorded is None:
                traceback.print_exc()
                said = " ".join(str(error).split())
                recorded = f"E_ENGINE: vLLM ended with {type(error).__name__}: {said}"
            raise _stopped(recorded) from error
        recorded = settings.recorded_failure()
        if recorded is not None:
            raise _stopped(recorded)


def _stopped(sentence: str) -> TrimtabError:
    code, mark, message = sentence.partition(": ")
    if mark and code.startswith("E_"):
        code, _, field = code.partition(" at ")
        return TrimtabError(code, message, field=field or None)
    return TrimtabError("E_ENGINE", sentence)


@contextmanager
def _settings(prepared: Prepared, max_body_bytes: int) -> Iterator[Settings]:
    folder = tempfile.mkdtemp(prefix="trimtab-serve-")
    try:
        settings = Settings(folder, max_body_bytes, prepared.thinking)
        settings.catalogue_path.write_text(json.dumps(prepared.catalogue.to_json()))
        os.environ.update(settings.to_environment())
        yield settings
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _refuse_unsupported(args: Namespace) -> None:
    for name, reason in _UNSUPPORTED:
        if getattr(args, name, None):
            flag = "--" + name.replace("_", "-")
            raise TrimtabError("E_SERVE_UNSUPPORTED", f"{flag}: {reason}", field=flag)


def _given_template(args: Namespace) -> str | None:
    """The chat template that vLLM is told to use instead of the checkpoint's."""
    if args.chat_template is None:
        return None
    from vllm.renderers.chat_utils import load_chat_template

    template: str = load_chat_template(args.chat_template)
    return template


def _markers(args: Namespace, template: str | None) -> tuple[str, str] | None:
    from directions.checkpoint import local_checkpoint
    from steering.thinking_markers import detect_markers

    return detect_markers(local_checkpoint(args.model), template)


def _fingerprint(args: Namespace, template: str | None, progress: Progress) -> ModelFingerprint:
    """The fingerprint of what vLLM is about to serve, its flags taken into account."""
    from directions.fingerprint import fingerprint

    if args.tokenizer not in (None, args.model):
        raise TrimtabError(
            "E_SERVE_UNSUPPORTED",
            "--tokenizer: directions are checked against the checkpoint's own tokenizer",
            field="--tokenizer",
        )
    found = fingerprint(args.model, progress=progress)
    if template is not None:
        digest = hashlib.sha256(template.encode()).hexdigest()
        found = found.model_copy(update={"chat_template_sha256": digest})
    return found


def _url(args: Namespace) -> str:
    if args.uds:
        return f"unix:{args.uds}"
    host = f"[{args.host}]" if ":" in args.host else args.host
    scheme = "https" if args.ssl_keyfile and args.ssl_certfile else "http"
    return f"{scheme}://{host}:{args.port}{args.root_path or ''}"
