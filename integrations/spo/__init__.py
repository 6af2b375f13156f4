"""SPO's trainers: TRL's trainers with the degree loss beside the alignment loss."""
