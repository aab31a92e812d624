"""What a patch costs in quality: texts, tasks, metrics, and a small real model to run them on."""
