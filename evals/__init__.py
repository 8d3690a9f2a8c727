"""Evaluation tasks that come with the package: pictures, questions and their true answers."""
