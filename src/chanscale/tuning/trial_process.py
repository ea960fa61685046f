"""The process of one trial: `python -m chanscale.tuning.trial_process FOLDER`, with its spec on stdin."""

from chanscale.comparison.cell_process import main
from chanscale.tuning.trials import TrialSpec

if __name__ == "__main__":
    main(TrialSpec)
