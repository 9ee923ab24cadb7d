"""Tests of what the READMEs say."""
import re
import shlex

import train
from studies.programs import run
from studies.test_studies import copy_of_the_project
from test_le import HERE, SMALL, seeded


def test_readme_commands_are_understood():
    """Every command in the READMEs is one that the programs know."""
    text = (HERE / "README.md").read_text() + (HERE / "studies" / "README.md").read_text()
    start = r"(?:python|torchrun --nproc_per_node=\d+) "
    commands = re.findall(rf"^    {start}(.*?)(?:  .*)?$", text, re.M)
    commands += re.findall(rf"`{start}([^`]*)`", text)
    assert len(commands) > 15
    for command in sorted(set(commands)):
        program, *arguments = shlex.split(command)
        if program == "train.py" and arguments != ["--help"]:
            train.parse(arguments)
        elif program == "train.py":
            assert set(train.every_option()) > set(train.DEFAULTS)
        elif arguments[0].startswith("studies."):
            assert (HERE / "studies" / f"{arguments[0].split('.')[1]}.py").exists(), command
        else:
            assert program in ("mine.py", "-c") or arguments[0] == "pytest", command


def test_readme_file_of_ones_own_works_as_it_is_shown(tmp_path):
    text = (HERE / "README.md").read_text()
    block, = [block for block in re.findall(r"```python\n(.*?)```", text, re.S)
              if "train.main()" in block]
    copied = copy_of_the_project(tmp_path / "copy")
    (copied / "mine.py").write_text(block)
    command = ["mine.py", *SMALL, "--protections", "corner", "--purifier", "blur", "--victim",
               "mlp"]
    said = run(copied, *command)
    assert "mlp on corner-le: " in said and "| corner |" in said
    (copied / "mine.py").write_text(block.replace("4, :4]", "5, :5]"))
    again = re.findall(r"^([\w-]+): made", run(copied, *command), re.M)
    assert "corner" in again and not {"vgg", "ddpm"} & set(again)  # what stands in other files


def test_readme_counts_the_lines_of_each_file():
    readme = (HERE / "README.md").read_text()
    for name, lines in re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", readme, re.M):
        counted = len((HERE / name).read_text().splitlines())
        assert abs(counted - int(lines)) <= 10, f"README.md: {name} has {counted} lines"
