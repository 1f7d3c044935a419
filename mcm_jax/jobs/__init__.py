"""Jobs, each one picture: files in, pictures out that say how they were made.

Jobs of one list may differ in everything: conditions, prompts, seeds, strengths, windows, pictures that are begun with
(these share batches), solver, steps and size (these do not). A size has one compiled program, two where some jobs have
text guidance and some have not.
"""

from mcm_jax.jobs.drawer import Drawer
from mcm_jax.jobs.job import CONTROLS, Job
from mcm_jax.jobs.lists import jobs_of_folder, read_jobs, replay
from mcm_jax.jobs.record import TEXT, read_record, sha256

__all__ = ["CONTROLS", "TEXT", "Drawer", "Job", "jobs_of_folder", "read_jobs", "read_record", "replay", "sha256"]
