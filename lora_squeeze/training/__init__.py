"""Training one adapter from a TOML file: sft, classify, dpo or grpo, by transformers, PEFT and TRL.

    record = train(read_run_settings(Path("config.toml")), Path("logs/mine"))
    record.adapter  # logs/mine/final

settings → data, model, trainer → checkpoints → final adapter and record. A run that was killed goes on
from its last checkpoint when it is started again; one that has finished is not repeated.
"""
