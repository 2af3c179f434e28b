"""Compare the licences of the installed packages with NOTICE: `make check` runs it after all lock files are installed.

What asks for more than its copyright notice needs a line in NOTICE. What is under the GPL alone may be no part of the
default installation or of the extra `all`. Prints a line for each fault, and exits with 1 if there is one.
"""

import re
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
NOTICE = ROOT / "NOTICE"
SHIPPED = ("requirements.lock", "infra/locks/extras.lock")
IMAGE = "infra/locks/servers.lock"
DEVELOPMENT = "requirements-dev.lock"

PERMISSIVE = re.compile(r"\b(0BSD|Apache|BSD|BSL|CC0|CNRI-Python|ISC|MIT|PSFL?|Python Software|Zlib)\b", re.IGNORECASE)
STRONG_COPYLEFT = re.compile(r"(?<!L)GPL|(?<!Lesser )General Public License", re.IGNORECASE)
WORDINGS = {
    "Permission is hereby granted, free of charge": "MIT",
    "Redistribution and use in source and binary forms": "BSD",
    "BSD style": "BSD",
}
"""How the texts of licences begin, for packages whose metadata name none."""


def requirements(lock: Path) -> Iterator[Requirement]:
    """The packages of a lock file that this platform needs."""
    for line in lock.read_text(encoding="utf-8").splitlines():
        if line[:1].isalpha():
            requirement = Requirement(line.removesuffix("\\"))
            if requirement.marker is None or requirement.marker.evaluate():
                yield requirement


def licence_of(package: Distribution) -> str:
    """The metadata's expression, else their field if it is one line, else their classifiers, else what the text is."""
    field = package.metadata.get("License") or ""
    classifiers = [line.split(" :: ")[-1] for line in package.metadata.get_all("Classifier") or [] if "License" in line]
    named = [package.metadata.get("License-Expression"), "" if "\n" in field else field, "; ".join(classifiers)]
    texts = [field] + [path.read_text() for path in package.files or [] if re.match(r"LICEN[CS]E|COPYING", path.name)]
    by_text = [name for text in texts for words, name in WORDINGS.items() if words in text]
    return next(
        (name for name in [*named, *by_text] if name and name not in ("OSI Approved", "Dual License")), "unknown"
    )


def alternatives(licence: str) -> list[list[str]]:
    """The licences that all hold, each as a list of those that one may choose from."""
    return [re.split(r" OR |\|", part.strip("() ")) for part in licence.split(" AND ")]


def is_permissive(licence: str) -> bool:
    """Whether it asks for no more than keeping its notice."""
    return all(any(PERMISSIVE.search(name) for name in choice) for choice in alternatives(licence))


def is_strong_copyleft(licence: str) -> bool:
    """Whether what is distributed with it falls under it too, and nothing else may be chosen."""
    parts = alternatives(licence)
    return any(all(STRONG_COPYLEFT.search(name) and "exception" not in name for name in choice) for choice in parts)


def faults(notice: str, locks: dict[str, dict[str, str]]) -> Iterator[str]:
    """What is wrong; `locks`: path of a lock file → package → its licence."""
    rows = dict(re.findall(r"^- ([a-z0-9-]+) \[(.+?)\]: ", notice, re.MULTILINE))
    for lock, licences in locks.items():
        for name, licence in licences.items():
            if lock != DEVELOPMENT and is_strong_copyleft(licence):
                yield f"{lock}: {name} is under {licence}: replace it, or keep its extra out of `all`"
            if not is_permissive(licence) and rows.get(name) != licence:
                yield f"NOTICE: {name} ({lock}) needs the line `- {name} [{licence}]: ` and what that asks for"
    for name in rows:
        licence = next((licences[name] for licences in locks.values() if name in licences), None)
        if licence is None or is_permissive(licence):
            yield f"NOTICE: {name} has a line, but no lock file has it, or its licence asks for nothing more"


def installed(lock: str) -> dict[str, str]:
    """Package → licence; of IMAGE, which is no part of a development environment, what is installed.

    Raises:
        SystemExit: a package of another lock file is not installed.
    """
    licences = {}
    for item in requirements(ROOT / lock):
        try:
            licences[canonicalize_name(item.name)] = licence_of(distribution(item.name))
        except PackageNotFoundError as error:
            if lock != IMAGE:
                message = f"{lock}: {item.name} is not installed; `make .venv/.installed-dev` installs it"
                raise SystemExit(message) from error
    return licences


def main() -> int:
    locks = {lock: installed(lock) for lock in (*SHIPPED, IMAGE, DEVELOPMENT)}
    found = list(faults(NOTICE.read_text(encoding="utf-8"), locks))
    print(*found, sep="\n", end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
