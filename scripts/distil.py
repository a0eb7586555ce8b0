"""accelerate launch scripts/distil.py CONFIG [a.b=value …]"""

from rlhf_fdiv.stages.common import run_stage

if __name__ == "__main__":
    run_stage("distil")
