"""Runs the command line in this process."""

from autodist_fx.cli.main import main


def fails(capsys, *argv):
    """Returns stderr, which must be one line."""
    assert main([str(a) for a in argv]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    return said.err


def refuses(capsys, *argv):
    """Returns what stderr says of a rank's program: one line; the ten of its graph around the node follow, indented."""
    assert main([str(a) for a in argv]) == 2
    said = capsys.readouterr()
    first, around, *lines = said.err.splitlines()
    assert said.out == "" and around.startswith("    around ") and len(lines) == 10
    assert [line[:6] for line in lines].count("    > ") == 1 and all(line[:4] == "    " for line in lines)
    return first


def succeeds(capsys, *argv):
    assert main([str(a) for a in argv]) == 0
    return capsys.readouterr().out
