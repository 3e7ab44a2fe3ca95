"""Print the CycloneDX bill of materials of an image: its Python and system packages, and llama.cpp.

    sbom.py IMAGE

Runs while an image is built, in the stage that has its environment: /opt/venv with what its .pth names,
and /dpkg-status, which lists the system packages of the image that will be. cyclonedx-bom describes the
Python packages; what it cannot see is added here.
"""

from __future__ import annotations

import json
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
    tunemill = next((part for part in python if part["name"] == "tunemill"), None)
    if tunemill is None:
        sys.exit("sbom.py: tunemill is not in the environment")
    bill["metadata"]["component"] = {
        "type": "container",
        "bom-ref": f"image-{image}",
        "name": f"tunemill/{image}",
        "version": tunemill["version"],
    }
    python += system_packages(Path("/dpkg-status").read_text("utf-8"), distribution())
    print(json.dumps(bill, indent=1, sort_keys=True))


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
