"""Sessions, QoS 2, retained messages, MQTT 5 properties and a stopped subscriber, with Debian's
mosquitto-clients and python3-paho-mqtt. .ci/interop runs it; the argument is the broker's port on 127.0.0.1."""
import collections
import queue
import signal
import subprocess
import sys
import time

import paho.mqtt.client as mqtt
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

PORT = int(sys.argv[1])
PATIENCE = 15  # seconds; all of this takes a few
VERSIONS = {"mqttv311": mqtt.MQTTv311, "mqttv5": mqtt.MQTTv5}
Message = collections.namedtuple("Message", "topic payload qos retain")


def expect(what, got, want):
    if got != want:
        sys.exit(f"interop: {what}\n  expected {brief(want)}\n  got      {brief(got)}{difference(got, want)}")


def brief(v):
    text = repr(v)
    return text if len(text) <= 600 else f"{text[:600]}... ({len(v)} in all)"


def difference(got, want):
    if not (isinstance(got, list) and isinstance(want, list)):
        return ""
    first = next((i for i, (g, w) in enumerate(zip(got, want)) if g != w), min(len(got), len(want)))
    lost, extra = (list((collections.Counter(map(str, a)) - collections.Counter(map(str, b))).elements())
                   for a, b in ((want, got), (got, want)))
    return (f"\n  {len(got)} for {len(want)}, the first difference at {first}; "
            f"missing: {brief(lost)}; unexpected or twice: {brief(extra)}")


def properties(kind, **values):
    p = Properties(kind)
    for name, value in values.items():
        setattr(p, name, value)
    return p


class Paho:
    """A paho client whose calls wait for the broker's answer. A session that is kept outlives close."""

    def __init__(self, name, version="mqttv5", keep=False):
        args = {"client_id": name, "protocol": VERSIONS[version]}
        if hasattr(mqtt, "CallbackAPIVersion"):  # paho 2
            args["callback_api_version"] = mqtt.CallbackAPIVersion.VERSION1
        v5 = version == "mqttv5"
        if not v5:
            args["clean_session"] = not keep
        self.name, self.v5, self.answers, self.messages = f"paho {name}", v5, queue.Queue(), queue.Queue()
        self.client = mqtt.Client(**args)
        self.client.max_inflight_messages_set(500)
        self.client.on_connect = lambda _c, _u, flags, code, *_: self.answers.put((flags["session present"], code))
        self.client.on_subscribe = lambda *_: self.answers.put("SUBACK")
        self.client.on_message = lambda _c, _u, m: self.messages.put(m)
        extra = {}
        if v5:
            extra = {"clean_start": not keep,
                     "properties": properties(PacketTypes.CONNECT, SessionExpiryInterval=300 if keep else 0)}
        self.client.connect("127.0.0.1", PORT, **extra)
        self.client.loop_start()
        present, code = self.answer("CONNACK")
        expect(f"{self.name}: CONNACK", int(getattr(code, "value", code)), 0)
        self.present = bool(present)

    def answer(self, what):
        try:
            return self.answers.get(timeout=PATIENCE)
        except queue.Empty:
            sys.exit(f"interop: {self.name}: no {what} in {PATIENCE} s")

    def subscribe(self, topic, qos, identifier=0):
        if self.v5:
            sub = properties(PacketTypes.SUBSCRIBE, SubscriptionIdentifier=identifier) if identifier else None
            self.client.subscribe(topic, options=SubscribeOptions(qos=qos), properties=sub)
        else:
            self.client.subscribe(topic, qos)
        self.answer("SUBACK")
        return self

    def publish(self, messages, **props):
        """Publishes all, and waits until all are acknowledged."""
        extra = {"properties": properties(PacketTypes.PUBLISH, **props)} if props else {}
        sent = [self.client.publish(m.topic, m.payload, m.qos, m.retain, **extra) for m in messages]
        until = time.monotonic() + PATIENCE
        while not all(s.is_published() for s in sent):
            if time.monotonic() > until:
                left = sum(not s.is_published() for s in sent)
                sys.exit(f"interop: {self.name}: {left} of {len(sent)} publishes not acknowledged in {PATIENCE} s")
            time.sleep(0.005)

    def until(self, last):
        """What comes before the payload last."""
        got = []
        try:
            while (m := self.messages.get(timeout=PATIENCE)).payload.decode() != last:
                got.append(m)
        except queue.Empty:
            sys.exit(f"interop: {self.name}: {last!r} did not come in {PATIENCE} s, but {len(got)} others: "
                     f"{brief([m.payload[:40] for m in got])}")
        return got

    def close(self):
        self.client.disconnect()
        self.client.loop_stop()


def mosquitto(tool, *args, version="mqttv5", **kwargs):
    command = [f"mosquitto_{tool}", "-p", str(PORT), "-V", version, *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * PATIENCE, **kwargs)
    if tool == "sub" and done.returncode == 27:
        print(f"interop: mosquitto_sub {version} did not get all in {PATIENCE} s")  # what is missing follows
    elif done.returncode != 0:
        sys.exit(f"interop: {' '.join(command)}: exit code {done.returncode}\n{done.stdout[-600:]}{done.stderr}")
    return done.stdout


def messages_of(text):
    """What mosquitto_sub -F '%q %r %t %p' has printed."""
    for line in text.splitlines():
        qos, retain, topic, payload = line.split(" ", 3)
        yield Message(topic, payload, int(qos), bool(int(retain)))


def simple(m):
    return Message(m.topic, m.payload.decode(), m.qos, bool(m.retain))


def by_qos(messages):
    """The payloads at each QoS. Clients hand out a message of QoS 2 when its PUBREL comes, and others at once: the broker's
    order is to be seen within a QoS."""
    return {q: [m.payload for m in messages if m.qos == q] for q in (1, 2)}


def offline_queue():
    """300 messages of QoS 1 and 2 in turn, while four sessions are offline; each gets all, once, in order."""
    persistent = ["-c", "-q", "2", "-t", "offline/#", "-F", "%q %r %t %p"]
    expiry = {"mqttv311": [], "mqttv5": ["-x", "300"]}
    for v in VERSIONS:
        mosquitto("sub", "-i", f"offline-sub-{v}", *persistent, *expiry[v], "-E", version=v)
        c = Paho(f"offline-{v}", v, keep=True)
        expect(f"{c.name}: session present at the first connection", c.present, False)
        c.subscribe("offline/#", 2).close()
    sent = [Message(f"offline/{i % 3}", str(i), 1 + i % 2, False) for i in range(300)]
    end = Message("offline/0", "end", 2, False)
    publisher = Paho("offline-publisher")
    publisher.publish(sent + [end])
    publisher.close()
    for v in VERSIONS:
        c = Paho(f"offline-{v}", v, keep=True)
        expect(f"{c.name}: session present when it is back", c.present, True)
        got = c.until("end")
        c.close()
        out = mosquitto("sub", "-i", f"offline-sub-{v}", *persistent, *expiry[v], "-C", "301", "-W", str(PATIENCE), version=v)
        sub = list(messages_of(out))
        for who, have in ((c.name, [simple(m) for m in got] + [end]), (f"mosquitto_sub {v}", sub)):
            for q in (1, 2):
                expect(f"{who}: queued while it was offline, QoS {q}", by_qos(have)[q], by_qos(sent + [end])[q])
            expect(f"{who}: messages with their topics", sorted(have), sorted(sent + [end]))
        expect(f"{c.name}: marked as sent again, on its first delivery", [m.payload for m in got if m.dup], [])


def qos2():
    """QoS 2 from mosquitto to paho and back, the versions mixed."""
    lines = [str(i) for i in range(50)]
    for here, there in (("mqttv311", "mqttv5"), ("mqttv5", "mqttv311")):
        c = Paho(f"qos2-{here}", here).subscribe("qos2/up", 2)
        for m in ("\n".join(lines), "end"):
            mosquitto("pub", "-q", "2", "-t", "qos2/up", "-l", version=there, input=m + "\n")
        expect(f"mosquitto_pub {there} to {c.name}, QoS 2", [(m.payload.decode(), m.qos, m.retain) for m in c.until("end")],
               [(m, 2, 0) for m in lines])
        keep = ["-c", "-i", f"qos2-sub-{there}", "-q", "2", "-t", "qos2/down", "-F", "%q %r %t %p"]
        keep += ["-x", "300"] if there == "mqttv5" else []
        mosquitto("sub", *keep, "-E", version=there)
        c.publish([Message("qos2/down", m, 2, False) for m in lines])
        got = list(messages_of(mosquitto("sub", *keep, "-C", str(len(lines)), "-W", str(PATIENCE), version=there)))
        expect(f"{c.name} to mosquitto_sub {there}, QoS 2", got, [Message("qos2/down", m, 2, False) for m in lines])
        c.close()


def retained():
    """`a` is for `a/#`; a later message takes the place of the first; an empty one removes it."""
    for v in VERSIONS:
        for topic, payload in (("a", "old"), ("a", "new"), ("a/b", "below"), ("ab", "other")):
            mosquitto("pub", "-q", "1", "-r", "-t", f"retained/{topic}", "-m", payload, version=v)
        want = [Message("retained/a", "new", 1, True), Message("retained/a/b", "below", 1, True)]
        args = ["-q", "1", "-t", "retained/a/#", "-F", "%q %r %t %p"]
        out = mosquitto("sub", *args, "-C", "2", "-W", str(PATIENCE), version=v)
        expect(f"mosquitto_sub {v}: retained messages for retained/a/#", sorted(messages_of(out)), want)
        c = Paho(f"retained-{v}", v).subscribe("retained/a/#", 1)
        c.publish([Message("retained/a", "end", 1, False)])  # comes after those
        expect(f"{c.name}: retained messages for retained/a/#", sorted(simple(m) for m in c.until("end")), want)
        c.close()
        for topic in ("a", "a/b", "ab"):
            mosquitto("pub", "-q", "1", "-r", "-n", "-t", f"retained/{topic}", version=v)
        c = Paho(f"retained-{v}", v).subscribe("retained/#", 1)
        c.publish([Message("retained/a", "end", 1, False)])
        expect(f"{c.name}: retained messages after they were removed", [simple(m) for m in c.until("end")], [])
        c.close()


def mqtt5_properties():
    """What a publish says of itself reaches the subscriber as it was, from each client to the other."""
    c = Paho("properties").subscribe("properties/#", 2, identifier=7)
    for q in (0, 1, 2):
        mosquitto("pub", "-q", str(q), "-t", "properties/up", "-m", "end", *(f for name, *value in (
            ("content-type", "application/json"), ("response-topic", "answers/1"), ("correlation-data", "c-1"),
            ("payload-format-indicator", "1"), ("message-expiry-interval", "300"),
            ("user-property", "k", "1"), ("user-property", "k", "2"), ("user-property", "Ä", "ö"),
        ) for f in ("-D", "publish", name, *value)))
        try:
            p = c.messages.get(timeout=PATIENCE).properties.json()
        except queue.Empty:
            sys.exit(f"interop: {c.name}: nothing came at QoS {q} in {PATIENCE} s")
        expiry = p.pop("MessageExpiryInterval", 0)
        expect(f"mosquitto_pub to {c.name}, QoS {q}: message expiry of {expiry} s is of 300", 300 - PATIENCE <= expiry <= 300, True)
        expect(f"mosquitto_pub to {c.name}, QoS {q}: properties", p, {
            "ContentType": "application/json", "ResponseTopic": "answers/1", "CorrelationData": b"c-1".hex(),
            "PayloadFormatIndicator": 1, "UserProperty": [("k", "1"), ("k", "2"), ("Ä", "ö")], "SubscriptionIdentifier": [7]})
    keep = ["-c", "-x", "300", "-i", "properties-sub", "-q", "2", "-t", "properties/down",
            "-D", "subscribe", "subscription-identifier", "9", "-F", "%q|%C|%R|%D|%F|%P|%S|%p"]
    mosquitto("sub", *keep, "-E")
    for q in (1, 2):
        c.publish([Message("properties/down", "hello", q, False)], ContentType="text/plain", ResponseTopic="answers/2",
                  CorrelationData=b"c-2", PayloadFormatIndicator=1, UserProperty=[("k", "1"), ("k", "2")])
    expect(f"{c.name} to mosquitto_sub: properties",
           sorted(mosquitto("sub", *keep, "-C", "2", "-W", str(PATIENCE)).splitlines()),
           [f"{q}|text/plain|answers/2|c-2|1|k:1 k:2|9|hello" for q in (1, 2)])
    c.close()


def stopped_subscriber():
    """A subscriber that is stopped, and has more to take than its socket holds, holds up neither the publisher nor
    another subscriber. Once it runs again it gets all, in order."""
    sent = [f"{i:06}{'.' * 8000}" for i in range(2000)]  # less than the broker queues, more than sockets do
    other = Paho("stopped-other").subscribe("stopped/#", 1)
    publisher = Paho("stopped-publisher")
    sub = subprocess.Popen(["mosquitto_sub", "-p", str(PORT), "-V", "mqttv311", "-c", "-i", "stopped", "-q", "1",
                            "-t", "stopped/#", "-C", str(len(sent) + 2), "-W", "60"], stdout=subprocess.PIPE, text=True)
    try:
        publisher.publish([Message("stopped/ready", "ready", 1, True)])  # retained: it comes whenever the client is there
        expect("mosquitto_sub: first line", sub.stdout.readline(), "ready\n")
        sub.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        publisher.publish([Message("stopped/x", p, 1, False) for p in sent + ["end"]])
        got = [m.payload.decode() for m in other.until("end")]
        took = time.monotonic() - began
        expect("a subscriber beside a stopped one", [p[:6] for p in got], ["ready"] + [p[:6] for p in sent])
        expect(f"2000 messages beside a stopped subscriber in {took:.1f} s: less than 10 s", took < 10, True)
        sub.send_signal(signal.SIGCONT)
        out, _ = sub.communicate(timeout=60)
        expect("mosquitto_sub that was stopped", [p[:6] for p in out.splitlines()], [p[:6] for p in sent + ["end"]])
    finally:
        sub.kill()
        sub.wait()
    publisher.close()
    other.close()


for check in (offline_queue, qos2, retained, mqtt5_properties, stopped_subscriber):
    start = time.monotonic()
    check()
    print(f"interop: {check.__name__} ({time.monotonic() - start:.1f}s)")
