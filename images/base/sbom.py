"""Print the CycloneDX bill of materials of an image: its Python and system packages, and llama.cpp.

    sbom.py IMAGE

Runs while an image is built, in the stage that has its environment: /opt/venv with PyTorch where its
.pth names it, /dpkg-status, which lists the system packages of the image that will be, and /tunemill.py,
which holds the version: a change of the code alone needs no new bill. cyclonedx-bom describes the Python
packages; what it cannot see is added here.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

ENVIRONMENT = "/opt/venv/bin/python"
TOOL = "/opt/build/bin/cyclonedx-py"


def main(image: str) -> None:
    """Print the bill of one image."""
    command = [TOOL, "environment", "--output-reproducible", "--output-format", "JSON", ENVIRONMENT]
    bill = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    python = bill.setdefault("components", [])
    version = version_of(Path("/tunemill.py").read_text("utf-8"))
    python.append(
        {
            "type": "application",
            "bom-ref": "tunemill",
            "name": "tunemill",
            "version": version,
            "purl": f"pkg:pypi/tunemill@{version}",
        }
    )
    bill["metadata"]["component"] = {
        "type": "container",
        "bom-ref": f"image-{image}",
        "name": f"tunemill/{image}",
        "version": version,
    }
    python += system_packages(Path("/dpkg-status").read_text("utf-8"), distribution())
    print(json.dumps(bill, indent=1, sort_keys=True))


def version_of(source: str) -> str:
    """Return the ``__version__`` of Tunemill's sources."""
    found = re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)
    if found is None:
        sys.exit("sbom.py: /tunemill.py names no version")
    return found[1]


def distribution() -> str:
    """Return the name of the base image's distribution, such as ``debian``."""
    fields = dict(
        line.split("=", 1) for line in Path("/etc/os-release").read_text("utf-8").splitlines() if "=" in line
    )
    return fields["ID"].strip('"')


def system_packages(status: str, distribution: str) -> list[dict[str, str]]:
    """Return the installed packages of dpkg's status file as components."""
    components = []
    for entry in status.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in entry.splitlines() if ": " in line and line[0] != " ")
        if not fields.get("Status", "").endswith(" installed"):
            continue
        name, version = fields["Package"], fields["Version"]
        purl = f"pkg:deb/{distribution}/{name}@{quote(version, safe='')}?arch={fields['Architecture']}"
        components.append(
            {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}
        )
    return components


if __name__ == "__main__":
    main(sys.argv[1])
