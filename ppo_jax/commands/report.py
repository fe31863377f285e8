"""The command `ppo-jax report`."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import tyro


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write one HTML page about runs: warnings, curves, samples and settings.

    It also shows the figures before and after training. Runs that differ only in their seed share a
    curve, with a band over the seeds. The page loads nothing from outside, so that it can be sent
    as one file.
    """

    example: ClassVar[str] = """ppo-jax report runs/a runs/b --out report.html"""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs of ppo-jax train, sft or reward. They may be in an object store."""
    out: Path
    """The page to write, such as report.html. An earlier file of that name is replaced."""

    def run(self) -> None:
        """Write the page."""
        from ppo_jax.run.files import check_links, write_text
        from ppo_jax.run.remote import local_copy
        from ppo_jax.run.report import make_report

        if not self.runs:
            raise ValueError("report needs the folder of a run, or of several.")
        check_links(self.out)
        page = make_report([local_copy(folder) for folder in self.runs])
        write_text(self.out, page)
        print(f"The report is in {self.out} ({len(page.encode()) / 1e6:.2f} MB).")
