"""Set parameters in a parameter file, keeping its comments, and check the whole file, as slurm/sweep.sh does.

python -m slurm.set_params params.yaml train.temperature=2 train.alpha=0.5
"""

import sys
from pathlib import Path

from ruamel.yaml import YAML

from firstsight.core import params
from firstsight.core.errors import UserError
from firstsight.core.stage import main


def set_params(path: Path, assignments: list[str]) -> None:
    """Write each `section.key=value` into `path`, the value being YAML.

    Raises:
        UserError: a key is not in the file, or its new value is not what it expects.
    """
    yaml = YAML()
    yaml.width = 1000  # no line is broken that was not
    yaml.representer.add_representer(type(None), lambda to, _: to.represent_scalar("tag:yaml.org,2002:null", "null"))
    document = yaml.load(path)
    for assignment in assignments:
        name, _, value = assignment.partition("=")
        *sections, key = name.split(".")
        place = document
        for section in sections:
            place = place.get(section) if isinstance(place, dict) else None
        if not isinstance(place, dict) or key not in place:
            raise UserError(f"{assignment}: expected KEY=VALUE with a key of params.yaml, such as train.alpha=0.5")
        place[key] = yaml.load(value)
    yaml.dump(document, path)
    params.load(path)


if __name__ == "__main__":
    main(lambda: set_params(Path(sys.argv[1]), sys.argv[2:]))
