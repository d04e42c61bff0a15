"""A run on a SLURM cluster: Dask workers as batch jobs, begun and ended with the run (`pip install dask-jobqueue`).

    python deploy/slurm/cluster.py manifest.csv --output /scratch/results --jobs 8 --partition cpu
    python deploy/slurm/cluster.py slides/ --output /scratch/results --jobs 4 --partition gpu --gpu --cores 8

Runs where `sbatch` works, such as a login node or a small job of its own; it holds the scheduler. Slides and results
have to be on a file system, or in a bucket, that every node reaches. Scheduler and workers speak TLS with certificates
made for this run: on a shared network anybody could otherwise run code as you. They lie in a folder below --shared that
only you can read, and go with the run. Credentials for S3 are taken from the environment of this command, which SLURM
hands on to its jobs (--export=ALL, its default); none is written into a script.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from pathlib import Path

from dask_jobqueue import SLURMCluster
from distributed import Client, Security

import wsi_mmm


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="A run of wsi-mmm on a SLURM cluster.")
    parser.add_argument("slides", nargs="+", help="slides, folders, patterns or a manifest")
    parser.add_argument("--output", required=True, help="folder or s3:// prefix that every node reaches")
    parser.add_argument("--model", default="default")
    parser.add_argument("--jobs", type=int, default=1, help="batch jobs, each with one worker")
    parser.add_argument("--cores", type=int, default=4, help="cores of a job")
    parser.add_argument("--memory", default="16GiB", help="memory of a job")
    parser.add_argument("--gpu", action="store_true", help="each job has one GPU; more GPUs are more jobs")
    parser.add_argument("--walltime", default="08:00:00")
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument("--interface", help="network interface that the nodes share, such as ib0")
    parser.add_argument("--shared", default=".", help="folder that every node reaches, for the certificates of the run")
    parser.add_argument("--print", action="store_true", help="print the job script and submit nothing")
    return parser.parse_args(words)


def cluster(args: argparse.Namespace, shared: str) -> SLURMCluster:
    """The cluster, without jobs yet. The worker of a job with a GPU has the resource GPU: models run there."""
    return SLURMCluster(
        queue=args.partition,
        account=args.account,
        walltime=args.walltime,
        cores=args.cores,
        memory=args.memory,
        processes=1,
        interface=args.interface,
        local_directory="/tmp",
        job_extra_directives=["--gres=gpu:1"] if args.gpu else [],
        job_script_prologue=["export OMP_NUM_THREADS=1"],
        worker_extra_args=["--preload", "wsi_mmm.host_tuning", *(["--resources", "GPU=1"] if args.gpu else [])],
        protocol="tls",
        security=Security.temporary(),
        shared_temp_directory=shared,
        scheduler_options={"dashboard_address": "127.0.0.1:0"},  # it is not encrypted
    )


def main() -> int:
    """Run; the exit code is that of `wsi-mmm run`."""
    args = parsed()
    with tempfile.TemporaryDirectory(prefix=".wsi-mmm-", dir=args.shared) as shared:
        try:
            return run(args, str(Path(shared).absolute()))
        finally:
            gc.collect()  # dask-jobqueue removes its certificates when it is forgotten: before their folder goes


def run(args: argparse.Namespace, shared: str) -> int:
    """The run, with its cluster round it."""
    with cluster(args, shared) as held, Client(held) as client:
        if args.print:
            print(held.job_script())
            return 0
        held.scale(jobs=args.jobs)
        client.wait_for_workers(1)
        report = wsi_mmm.submit(client, args.slides, args.model, output=args.output).result()
    print(f"{len(report.slides)} slides in {report.seconds:.0f} s, see {report.path}")
    return int(report.exit_code)


if __name__ == "__main__":
    sys.exit(main())
