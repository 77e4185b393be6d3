"""What a run on a machine with a GPU needs beside the benchmarks: see `gpu_suite.sh`."""
