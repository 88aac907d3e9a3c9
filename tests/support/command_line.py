"""Runs the command line in this process."""

from autodist_fx.cli.main import main


def fails(capsys, *argv):
    """What stderr says, which must be one line."""
    assert main([str(a) for a in argv]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    return said.err


def succeeds(capsys, *argv):
    assert main([str(a) for a in argv]) == 0
    return capsys.readouterr().out
