"""Prints what torch is built with and which devices it sees. A script: imports nothing of ours."""

import json
import signal
import sys


def say(stage: str, **what: object) -> None:
    print(json.dumps({"stage": stage, **what}), flush=True)


def main() -> int:
    signal.alarm(3600)  # nothing is left for ever, should whoever waits for this be killed
    say("import", begun=True)
    try:
        import torch
    except Exception as error:  # a missing library of the driver, a wrong glibc: anything can be raised here
        say("import", error=f"{type(error).__name__}: {error}"[:500])
        return 0
    say("import", version=torch.__version__, cuda=torch.version.cuda, hip=torch.version.hip)
    say("devices", begun=True)
    devices = []
    trouble = ""
    try:
        count = torch.cuda.device_count()
        for index in range(count):
            properties = torch.cuda.get_device_properties(index)
            arch = getattr(properties, "gcnArchName", "") if torch.version.hip else ""
            arch = arch.split(":")[0] or f"sm_{properties.major}{properties.minor}"
            devices.append({"name": properties.name, "memory": properties.total_memory, "arch": arch})
    except Exception as error:
        trouble = f"{type(error).__name__}: {error}".splitlines()[0][:500]
    nccl = None
    if devices:
        try:
            nccl = ".".join(map(str, torch.cuda.nccl.version()))
        except Exception as error:
            nccl = f"none ({error})"
    say("devices", devices=devices, error=trouble, nccl=nccl, archs=torch.cuda.get_arch_list())
    return 0


if __name__ == "__main__":
    sys.exit(main())
