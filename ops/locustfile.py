"Load from many callers: PHOENIX_KEY=… PHOENIX_IMAGE=slice.png locust -f ops/locustfile.py -H http://127.0.0.1:8000"
import os
from pathlib import Path

from locust import HttpUser, constant, task


class Caller(HttpUser):
    "Asks again as soon as it is answered; 429 is an answer"
    wait_time = constant(0)

    def on_start(self):
        self.image = Path(os.environ["PHOENIX_IMAGE"]).read_bytes()
        self.client.headers.update({"Authorization": f"Bearer {os.environ['PHOENIX_KEY']}"})

    @task(20)
    def predict(self):
        with self.client.post("/v1/predict", data=self.image, headers={"Content-Type": "application/octet-stream"},
                              catch_response=True) as answer:
            if answer.status_code == 429: answer.success()

    @task(1)
    def models(self): self.client.get("/v1/models")
