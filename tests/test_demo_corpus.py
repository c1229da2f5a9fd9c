"""The demo's corpus: the same bytes twice, nothing held out that is trained on, right sums."""

import json
import random
import re
import sysconfig
from pathlib import Path

import pytest

from turbosparse.demo.arithmetic import make_problem
from turbosparse.demo.corpus import LONGEST_DOCUMENT, Domain, make_corpus

BYTES = 40_000
NAMES = ["code", "docs", "math", "qa"]
STEP = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[Domain]:
    return make_corpus(tmp_path_factory.mktemp("corpus"), bytes_per_domain=BYTES)


def texts(path: Path) -> list[str]:
    rows = [json.loads(line) for line in path.read_bytes().decode().split("\n")[:-1]]
    assert all(row.keys() == {"text"} for row in rows)
    return [row["text"] for row in rows]


def normalised(path: Path) -> list[str]:
    return [" ".join(text.split()).casefold() for text in texts(path)]


def calculated(left: int, operator: str, right: int) -> int:
    if operator == "/":
        quotient, rest = divmod(left, right)
        assert rest == 0
        return quotient
    return {"+": left + right, "-": left - right, "*": left * right}[operator]


def test_reports_what_it_wrote(corpus: list[Domain]) -> None:
    assert [domain.name for domain in corpus] == NAMES
    for domain in corpus:
        train, held_out = texts(domain.train), texts(domain.held_out)
        assert domain.documents == len(train) + len(held_out)
        assert domain.train_bytes == sum(len(text.encode()) for text in train)
        assert domain.held_out_bytes == sum(len(text.encode()) for text in held_out)
        assert {path.name for path in domain.train.parent.iterdir()} == {
            "train.jsonl",
            "held_out.jsonl",
        }


def test_sizes_are_near_what_was_asked(corpus: list[Domain]) -> None:
    for domain in corpus:
        assert 0.95 * BYTES <= domain.train_bytes <= 0.95 * BYTES + 2 * LONGEST_DOCUMENT
        assert 0.05 * BYTES <= domain.held_out_bytes <= 0.05 * BYTES + 2 * LONGEST_DOCUMENT


def test_same_seed_same_bytes(corpus: list[Domain], tmp_path: Path) -> None:
    again = make_corpus(tmp_path / "again", bytes_per_domain=BYTES)
    other = make_corpus(tmp_path / "other", bytes_per_domain=BYTES, seed=1)
    for one, same, different in zip(corpus, again, other, strict=True):
        assert one.train.read_bytes() == same.train.read_bytes()
        assert one.held_out.read_bytes() == same.held_out.read_bytes()
        assert one.train.read_bytes() != different.train.read_bytes()


def test_no_document_twice(corpus: list[Domain]) -> None:
    for domain in corpus:
        documents = normalised(domain.train) + normalised(domain.held_out)
        assert len(documents) == len(set(documents))


def test_held_out_problems_are_in_no_training_text(corpus: list[Domain]) -> None:
    def questions(split: str) -> set[tuple[str, ...]]:
        """By numbers and plan: another name or object makes no other problem."""
        found = set()
        for domain in corpus:
            if domain.name == "math":
                for text in texts(getattr(domain, split)):
                    question, plan, *_ = text.split("\n")
                    found.add((plan, *sorted(re.findall(r"\d+", question))))
                    found.add((question,))
            elif domain.name == "qa":
                found |= {(text.split("\n")[0],) for text in texts(getattr(domain, split))}
        return found

    train, held_out = questions("train"), questions("held_out")
    assert len(held_out) > 20
    assert held_out.isdisjoint(train)


def test_worked_steps_are_right(corpus: list[Domain]) -> None:
    math = next(domain for domain in corpus if domain.name == "math")
    for text in texts(math.train) + texts(math.held_out):
        question, _plan, *steps, last = text.split("\n")
        known = set(re.findall(r"\d+", question)) | {"100"}
        for step in steps:
            match = STEP.fullmatch(step)
            assert match, text
            left, operator, right, result = match.groups()
            assert known >= {left, right}, text
            assert calculated(int(left), operator, int(right)) == int(result), text
            known.add(result)
        assert last == f"Answer: {result}", text


def test_equations_are_solved() -> None:
    rng = random.Random(0)
    solved = 0
    for _ in range(2000):
        problem = make_problem(rng)
        match = re.search(r"(\d+)x ([-+]) (\d+) = (\d+)", problem.question)
        if match:
            a, sign, b, c = match.groups()
            assert calculated(int(a) * problem.answer, sign, int(b)) == int(c)
            solved += 1
    assert solved > 100


def test_short_questions_have_right_answers(corpus: list[Domain]) -> None:
    qa = next(domain for domain in corpus if domain.name == "qa")
    pattern = r"Question: What is (\d+) ([-+*/]) (\d+)\?\nAnswer: (\d+)"
    found = [match for text in texts(qa.train) if (match := re.fullmatch(pattern, text))]
    assert len(found) > 20
    for match in found:
        left, operator, right, result = match.groups()
        assert calculated(int(left), operator, int(right)) == int(result)
    assert all(re.fullmatch(r"Question: .+\nAnswer: .+", text) for text in texts(qa.train))


LIBRARY_FILE = (
    '''"""Shows how a file of the library becomes text, in a sentence as long as prose has."""

# What the greeting is for.
def greet(name: str) -> str:
    """Return a greeting for `name`, e.g. for a letter. Nothing is sent."""
    return f"Hello {name}"

TABLE = [
'''
    + "    1234567890,\n" * 200
    + "]\n"
    + '''

class Long:
    """Hold many methods."""

'''
    + "\n".join(f"    def method_{i}(self):\n        return {i}\n" for i in range(200))
)


def test_cuts_files_at_definitions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "lib"
    for name in ("module.py", "test/skipped.py", "site-packages/skipped.py"):
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_text(LIBRARY_FILE if name == "module.py" else "x = 1\n" * 50)
    (library / "latin1.py").write_bytes("# é".encode("latin-1"))
    (library / "broken.py").write_text("def (:\n")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(library)})

    domains = make_corpus(tmp_path / "corpus", bytes_per_domain=20_000)
    written = {d.name: texts(d.train) + texts(d.held_out) for d in domains}

    assert all(len(text) <= LONGEST_DOCUMENT for text in written["code"])
    code = "\n".join(written["code"])
    assert "# What the greeting is for.\ndef greet" in code
    assert "1234567890" not in code
    assert "x = 1" not in code
    assert all(f"    def method_{i}(self):\n        return {i}" in code for i in range(200))
    assert len(written["docs"]) == 1
    assert written["docs"][0].startswith("Shows how a file")
    answers = [text.split("\nAnswer: ")[1] for text in written["qa"] if "module.greet" in text]
    assert answers == ["Return a greeting for `name`, e.g. for a letter."]


@pytest.mark.parametrize("exists", [True, False])
def test_missing_library_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    library = tmp_path / "python311.zip"
    if exists:
        library.mkdir()
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    with pytest.raises(ValueError, match=r"python311\.zip.*Install the Python standard library"):
        make_corpus(tmp_path / "corpus")


@pytest.mark.parametrize("options", [{"bytes_per_domain": 0}, {"held_out_share": 1.0}])
def test_bad_options_are_refused(tmp_path: Path, options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} is"):
        make_corpus(tmp_path, **options)
