"""The parts of `buildtool.models`: files and their headers, digests, configs, the hub, single files, random weights."""
