"""Which options of ``dask-agent`` mean what, and the order in which ``--help`` shows them."""

from __future__ import annotations

#: Parameters of ``dask worker`` that mean more, or another thing, here.
OURS = ("listen_address", "version")

#: Options of ``dask worker`` that every worker gets as they are, whatever its mode.
FOR_WORKERS = (
    "host",
    "interface",
    "protocol",
    "local_directory",
    "scheduler_sni",
    "dashboard",
    "dashboard_address",
    "lifetime",
    "lifetime_stagger",
    "lifetime_restart",
    "preload",
    "preload_argv",
    "preload_nanny",
    "worker_port",
    "nanny_port",
    "contact_address",
)

#: The options that say what runs, as the user types them.
FLAGS = {
    "mode": "--mode",
    "mode_config": "--config",
    "spec": "--spec",
    "spec_file": "--spec-file",
    "n_workers": "--nworkers",
    "nthreads": "--nthreads",
    "memory_limit": "--memory-limit",
}
#: Options that are the first mode's -> their names there.
SHAPE = {"n_workers": "nworkers", "nthreads": "nthreads", "memory_limit": "memory_limit"}

#: The sections of ``--help``, and what each has; an option of ``dask worker`` that is new to us comes last.
SECTIONS = {
    "What runs here first": ("mode", "mode_config", "spec", "spec_file", *SHAPE, "nanny", "worker_class"),
    "Which scheduler": ("scheduler_file", "standby", "name", "labels", "death_timeout", "scheduler_sni"),
    "Where it listens": (
        *("host", "interface", "protocol", "listen_address", "contact_address", "worker_port", "nanny_port"),
        *("dashboard", "dashboard_address"),
    ),
    "Encryption": ("tls_ca_file", "tls_cert", "tls_key"),
    "For all workers, whatever runs": (
        *("resources", "local_directory", "preload", "preload_argv", "preload_nanny"),
        *("lifetime", "lifetime_stagger", "lifetime_restart"),
    ),
}
