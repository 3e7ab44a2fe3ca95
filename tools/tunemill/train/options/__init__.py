"""The options of TRL's SFTConfig and PEFT's LoraConfig, by their own names."""
