import os

os.environ["TQDM_DISABLE"] = "1"                # no progress bars in the reports; set before tqdm is imported
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
