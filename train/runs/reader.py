"""What `flaxzoo.zoo` calls to read the folder of a run."""

from ...zoo.formats.load import RunReader
from .folder import load, open_run, text_of_run

RUN_READER = RunReader(load, open_run, text_of_run)
