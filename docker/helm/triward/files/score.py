"""Ask models for two scores, as a client does: ADDRESS, a folder with ca.crt or "", MODEL…"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton

address, folder, *models = sys.argv[1:]
files = {"root_certificates": "ca.crt", "certificate_chain": "tls.crt", "private_key": "tls.key"}
found = {name: str(Path(folder, file)) for name, file in files.items() if folder}
tls = {name: path for name, path in found.items() if Path(path).exists()}
client = triton.InferenceServerClient(address, ssl=bool(folder), **tls)

messages = json.dumps([{"role": "user", "content": "What is two and two?"}])
values = {"messages": [messages], "responses": ["Four.", "Five."], "media": []}
inputs = []
for name, texts in values.items():
    tensor = triton.InferInput(name, [1, len(texts)], "BYTES")
    tensor.set_data_from_numpy(np.array([[text.encode() for text in texts]], dtype=np.object_))
    inputs.append(tensor)

for model in models:
    scores = client.infer(model, inputs, client_timeout=60).as_numpy("scores")[0]
    if len(scores) != 2 or not all(map(math.isfinite, scores)):
        sys.exit(f"{model} answered {scores}, not two scores")
    print(f"{model}: {scores[0]:.4f} for Four, {scores[1]:.4f} for Five")
