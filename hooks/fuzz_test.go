package hooks_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/throughline-mqtt/throughline/bridge"
	"github.com/throughline-mqtt/throughline/hooks"
	"github.com/throughline-mqtt/throughline/hooks/guard"
)

// These tests send a server what no client would, through real connections, while another client is to be served as if
// nothing were. guard's own fuzzing holds frames against mochi's decoders; here it is whole connections: their order, their
// end, what is answered, and what stays behind.

const (
	// fuzzPacket is the server's limit on packets, above the one on CONNECT so that both can be met.
	fuzzPacket = 72 << 10
	// fuzzInput bounds an input: enough for a packet that is too large.
	fuzzInput = 80 << 10
	// fuzzWrites bounds the writes of one input, so that it takes milliseconds however small its chunks are.
	fuzzWrites = 64
	// fuzzID is the client identifier of preludes and of composed connections.
	fuzzID = "fuzz"

	// fuzzPatience bounds what is waited for. It is below the ten seconds after which go's fuzzing ends the process, which would not
	// say what it was that did not come.
	fuzzPatience = 4 * time.Second

	// Before it is authenticated a connection may cost allocFactor bytes for each that it has sent, and allocBase, garbage
	// included: a user property of five bytes takes some 300, in slices that grow, and in mochi's copy of them. The base is
	// for the connection itself, mochi's client, and this test's own side.
	allocFactor = 80
	allocBase   = 256 << 10
)

// fuzzed is a server under fuzzing with a witness: a client that has to be served whatever the input is. It is made anew
// after a failure, so that a failure is not blamed on the inputs that come after it.
type fuzzed struct {
	*served
	witness *peer
	topic   string // of the witness; nobody can guess it, nor its client identifier
	asked   uint64 // the last message that the witness has sent to itself
	broken  bool
	dialed  int // connections so far

	subscriptions float64 // the gauge when nobody is there but the witness
}

// newFuzzed starts a server that lives as long as tb.
func newFuzzed(tb testing.TB) *fuzzed {
	z := new(fuzzed)
	z.start(tb)
	tb.Cleanup(z.stop)
	return z
}

func (z *fuzzed) start(tb testing.TB) {
	tb.Helper()
	// Records are on disk at once, but not in the goroutine of the connection.
	stored := func([]bridge.Record) (hooks.Commit, error) { return done(nil), nil }
	z.served = serve(tb, stored, func(o *hooks.Options) {
		o.MaxPacketSize = fuzzPacket
		o.ConnectTimeout = time.Hour // what is to be closed at once must not be closed by this
	})
	id := rand.Text()
	z.topic, z.asked, z.broken, z.dialed, z.subscriptions = "witness/"+id, 0, false, 1, 1
	var err error
	if z.witness, _, err = connectPeer(z.address, 5, id, true); err != nil {
		tb.Fatal(err)
	}
	z.witness.wait = fuzzPatience
	if err := z.witness.subscribe(z.topic, 1); err != nil {
		tb.Fatal(err)
	}
}

func (z *fuzzed) stop() {
	z.witness.Close()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	_ = z.Close(ctx) // TestSoak looks at how it ends
}

// begin is to be called first for each input. What fails after it leaves a server that is not used again.
func (z *fuzzed) begin(t *testing.T) {
	t.Helper()
	if z.broken {
		z.stop()
		z.start(t)
	}
	z.broken = true
}

// ask has the witness send a message to itself, and a PINGREQ.
func (z *fuzzed) ask() error {
	z.asked++
	out := appendPublish(nil, 5, z.topic, 1, false, 1, binary.BigEndian.AppendUint64(nil, z.asked))
	_, err := z.witness.Write(append(out, pingreq...))
	return err
}

// answered waits for what the witness has asked for.
func (z *fuzzed) answered() error {
	w := z.witness
	_ = w.SetReadDeadline(time.Now().Add(fuzzPatience))
	missing := map[byte]bool{packets.Puback: true, packets.Publish: true, packets.Pingresp: true}
	for len(missing) > 0 {
		f, err := w.read()
		if err != nil {
			return fmt.Errorf("the witness is not served: %w", err)
		}
		if !missing[f.kind] {
			return fmt.Errorf("the witness got %s %x", packets.PacketNames[f.kind], f.body)
		}
		delete(missing, f.kind)
		if f.kind != packets.Publish {
			continue
		}
		topic, id, payload, err := f.publish(5)
		if err != nil || topic != z.topic || len(payload) != 8 || binary.BigEndian.Uint64(payload) != z.asked {
			return fmt.Errorf("the witness got %s %x, want message %d: %v", topic, payload, z.asked, err)
		}
		if _, err := w.Write(appendAck(nil, packets.Puback, id)); err != nil {
			return err
		}
	}
	return nil
}

// quiet are the gauges when nobody is there but the witness.
var quiet = map[string]float64{
	"throughline_connections":            1,
	"throughline_refused_connections":    0,
	"throughline_mqtt_sessions":          1,
	"throughline_mqtt_clients":           1,
	"throughline_mqtt_retained_messages": sysTopics,
	"throughline_mqtt_messages_queued":   0,
}

// sysTopics are retained too, from the start on.
const sysTopics = 20

// wantQuiet clears what the input has left on purpose, and fails unless then all is as before it.
func (z *fuzzed) wantQuiet(t *testing.T, l left) {
	t.Helper()
	if l.early || len(l.retained) > 0 { // a session must not be ended before it begins, nor a will be cleared before it is published
		z.await(t, func() string { return z.unended(t) })
	}
	for _, id := range l.sessions {
		p := z.dial(t, 4)
		if _, err := p.connect(id, true, 60); err != nil {
			t.Fatalf("end the session %q: %v", id, err)
		}
		_, _ = p.Write([]byte{packets.Disconnect << 4, 0})
		if _, err := p.read(); err != io.EOF {
			t.Fatalf("end the session %q: %v", id, err)
		}
		p.Close()
	}
	if len(l.retained) > 0 {
		var out []byte
		for topic := range l.retained {
			out = appendFrame(out, packets.Publish<<4|1, text(topic), []byte{0})
		}
		if _, err := z.witness.Write(append(out, pingreq...)); err != nil {
			t.Fatal(err)
		}
		if _, err := z.witness.expect(packets.Pingresp); err != nil {
			t.Fatalf("the witness is not served: %v", err)
		}
	}
	z.await(t, func() string { return z.unquiet(t, l) })
	z.broken = false
}

// await waits until left says that nothing is.
func (z *fuzzed) await(t *testing.T, left func() string) {
	t.Helper()
	pause := 50 * time.Microsecond
	for end := time.Now().Add(fuzzPatience); ; time.Sleep(pause) {
		wrong := left()
		if wrong == "" {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("left behind: %s", wrong)
		}
		pause = min(2*pause, 10*time.Millisecond)
	}
}

// unended says whether a connection has not been accepted yet, or has not ended.
func (z *fuzzed) unended(t *testing.T) string {
	t.Helper()
	accepted, open := z.sum(t, "throughline_connections_accepted_total"), z.sum(t, "throughline_connections")
	if accepted == float64(z.dialed) && open == 1 {
		return ""
	}
	return fmt.Sprintf("%v connections of %v, %d were dialed", open, accepted, z.dialed)
}

// dial opens a connection.
func (z *fuzzed) dial(t *testing.T, version byte) *peer {
	t.Helper()
	p, err := dialPeer(z.address, version)
	if err != nil {
		t.Fatal(err)
	}
	p.wait = fuzzPatience
	z.dialed++
	return p
}

// unquiet says what is not as it was. A panic fails at once.
func (z *fuzzed) unquiet(t *testing.T, l left) (wrong string) {
	t.Helper()
	families, err := z.metrics.Gather()
	if err != nil {
		t.Fatal(err)
	}
	seen := 0
	for _, f := range families {
		name := f.GetName()
		total := 0.0
		for _, m := range f.GetMetric() {
			total += m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
		switch want, ok := quiet[name]; {
		case name == "throughline_connection_panics_total" || name == "throughline_hook_panics_total":
			seen++
			if total != 0 {
				t.Fatalf("%s is %v\n%s", name, total, z.log)
			}
		case name == "throughline_mqtt_subscriptions":
			seen++
			if total != z.subscriptions {
				wrong += fmt.Sprintf("%s is %v, want %v; ", name, total, z.subscriptions)
			}
		case ok:
			seen++
			if total != want {
				wrong += fmt.Sprintf("%s is %v, want %v; ", name, total, want)
			}
		}
	}
	if seen != len(quiet)+3 {
		t.Fatalf("%d of the metrics exist, want %d", seen, len(quiet)+3)
	}
	return wrong
}

// heard is what came back on a connection.
type heard struct {
	frames []frame // each with a body of its own
	err    error   // what ended it; nil: the server has closed it between two packets
}

// errOpen says that the server did not close a connection that it had to.
var errOpen = errors.New("the server has not closed the connection")

// listen reads until the connection ends, and calls each after each packet, which may be nil.
func listen(p *peer, each func(frame)) heard {
	var h heard
	_ = p.SetReadDeadline(time.Now().Add(fuzzPatience))
	for {
		if _, err := p.r.Peek(1); err != nil {
			switch {
			case errors.Is(err, os.ErrDeadlineExceeded):
				h.err = errOpen
			case err != io.EOF:
				h.err = err
			}
			return h
		}
		f, err := p.read()
		switch {
		case err == io.EOF:
			err = io.ErrUnexpectedEOF
			fallthrough
		case err != nil:
			h.err = err
			return h
		}
		f.body = bytes.Clone(f.body)
		h.frames = append(h.frames, f)
		if each != nil {
			each(f)
		}
	}
}

// ending is how the client's side of a connection ends.
type ending byte

const (
	halfClose ending = iota
	fullClose        // at once: what comes back is lost
	stay             // the server has to close
)

// converse sends a stream in chunks, ends the connection, and has the witness served meanwhile.
func (z *fuzzed) converse(t *testing.T, stream []byte, chunk int, end ending) heard {
	t.Helper()
	p := z.dial(t, 5)
	defer p.Close()
	result := make(chan heard, 1)
	go func() { result <- listen(p, nil) }()
	if chunk <= 0 {
		chunk = len(stream)
	}
	chunk = max(chunk, len(stream)/fuzzWrites, 1)
	if err := z.ask(); err != nil {
		t.Fatalf("the witness is not served: %v", err)
	}
	for part := range slices.Chunk(stream, chunk) {
		if _, err := p.Write(part); err != nil {
			break // the server has closed the connection, and may
		}
	}
	switch end {
	case halfClose:
		_ = p.Conn.(*net.TCPConn).CloseWrite() // fails if the server was faster
	case fullClose:
		p.Close()
	}
	if err := z.answered(); err != nil {
		t.Fatal(err)
	}
	return <-result
}

// left is what a connection leaves with the server on purpose.
type left struct {
	sessions []string        // client identifiers of sessions that outlive it
	retained map[string]bool // topic names that may have a message

	early bool // the client has closed it without waiting for anything
}

// reading is what a server has to make of a stream, as far as that is known without its state.
type reading struct {
	version byte   // of the CONNECT; 0: there is none, or of an unknown level
	ends    string // why the server has to close the connection by itself; empty: it has not
	connect packets.Packet
	left
}

// understand reads a stream as a client sends it.
func understand(stream []byte) reading {
	r := reading{left: left{retained: make(map[string]bool)}}
	topics, retains := make(map[string]bool), false
	defer func() {
		if retains { // an alias may stand for any topic name that was sent
			maps.Copy(r.retained, topics)
		}
	}()
	for first := true; len(stream) > 0; first = false {
		kind := stream[0] >> 4
		if first && kind != packets.Connect {
			r.ends = "the first packet is no CONNECT"
			return r
		}
		switch kind {
		case packets.Reserved, packets.Connack, packets.Suback, packets.Unsuback, packets.Pingresp:
			r.ends = "packet type of servers"
			return r
		}
		limit := fuzzPacket
		if first {
			limit = guard.MaxConnectSize
		}
		size, n := 0, 1
		for ; n < len(stream) && n <= 4; n++ {
			size |= int(stream[n]&0x7f) << (7 * (n - 1))
			if 1+n+size > limit {
				r.ends = "too large"
				return r
			}
			if stream[n] < 0x80 {
				break
			}
		}
		if n > 4 {
			r.ends = "remaining length of more than four bytes"
			return r
		}
		if n == len(stream) || len(stream) < 1+n+size {
			return r // the rest of a packet never comes
		}
		frame := stream[:1+n+size]
		stream = stream[len(frame):]
		if first {
			r.version = level(frame[1+n:])
		} else if kind == packets.Connect { // only when it is there whole
			r.ends = "a second CONNECT"
			return r
		}
		inspected := r.version
		if first {
			inspected = 0
		}
		if err := guard.Inspect(inspected, frame); err != nil {
			r.ends = err.Error()
			return r
		}
		pk, err := decode(r.version, frame)
		if first && r.version == 0 {
			r.ends = "unknown protocol level"
			return r
		}
		if err != nil {
			r.ends = "mochi: " + err.Error()
			return r
		}
		switch kind {
		case packets.Connect:
			r.connect = pk
			if c := pk.Connect; c.WillFlag && c.WillRetain {
				r.retained[c.WillTopic] = true
			}
		case packets.Publish:
			retains = retains || pk.FixedHeader.Retain
			if pk.TopicName != "" {
				topics[pk.TopicName] = true
			}
		case packets.Disconnect:
			r.ends = "DISCONNECT"
			return r
		}
	}
	return r
}

// level is the protocol level of a CONNECT's body, 0 if there is no such level.
func level(body []byte) byte {
	for _, l := range []struct {
		start   string
		version byte
	}{{"\x00\x06MQIsdp\x03", 3}, {"\x00\x04MQTT\x04", 4}, {"\x00\x04MQTT\x05", 5}} {
		if bytes.HasPrefix(body, []byte(l.start)) {
			return l.version
		}
	}
	return 0
}

// outlives says which session outlives the connection, if CONNECT was accepted.
func (r *reading) outlives(connack frame) []string {
	switch {
	case r.version == 5 && r.connect.Properties.SessionExpiryInterval == 0, r.version < 5 && r.connect.Connect.Clean:
		return nil
	case r.connect.Connect.ClientIdentifier != "":
		return []string{r.connect.Connect.ClientIdentifier}
	}
	pk := packets.Packet{ProtocolVersion: 5}
	if pk.ConnackDecode(bytes.Clone(connack.body)) != nil || pk.Properties.AssignedClientID == "" {
		return nil
	}
	return []string{pk.Properties.AssignedClientID}
}

// accepts reports whether the packets begin with a CONNACK that lets the client in.
func accepts(frames []frame) bool {
	return len(frames) > 0 && frames[0].kind == packets.Connack && len(frames[0].body) > 1 && frames[0].body[1] == 0
}

// allowed are the reason codes that a server may send in MQTT 5 (2.4, and the tables of each packet).
var allowed = map[byte]string{
	packets.Connack:  "\x00\x80\x81\x82\x83\x84\x85\x86\x87\x88\x89\x8a\x8c\x90\x95\x97\x99\x9a\x9b\x9c\x9d\x9f",
	packets.Puback:   "\x00\x10\x80\x83\x87\x90\x91\x97\x99",
	packets.Pubrec:   "\x00\x10\x80\x83\x87\x90\x91\x97\x99",
	packets.Pubrel:   "\x00\x92",
	packets.Pubcomp:  "\x00\x92",
	packets.Suback:   "\x00\x01\x02\x80\x83\x87\x8f\x91\x97\x9e\xa1\xa2",
	packets.Unsuback: "\x00\x11\x80\x83\x87\x8f\x91",
	packets.Disconnect: "\x00\x80\x81\x82\x83\x87\x89\x8b\x8d\x8e\x8f\x90\x93\x94\x95\x96\x97\x98\x99\x9a\x9b\x9c\x9d\x9e\x9f" +
		"\xa0\xa1\xa2",
}

// wantAnswers fails unless the packets are what a server may send to a client of that version, in an order in which it may.
func wantAnswers(t *testing.T, r *reading, frames []frame) {
	t.Helper()
	for i, f := range frames {
		switch {
		case (i == 0) != (f.kind == packets.Connack):
			t.Fatalf("packet %d of the server is %s: CONNACK is the first packet, and comes once [MQTT-3.2.0-1]", i, packets.PacketNames[f.kind])
		case i > 0 && frames[i-1].kind == packets.Disconnect:
			t.Fatalf("%s after DISCONNECT [MQTT-3.14.4-1]", packets.PacketNames[f.kind])
		case i == 1 && frames[0].body[1] != 0:
			t.Fatalf("%s after a CONNACK that refuses [MQTT-3.2.2-7]", packets.PacketNames[f.kind])
		}
		if err := mayAnswer(r, f); err != nil {
			t.Fatalf("the server sent %s, flags %04b, %x: %v", packets.PacketNames[f.kind], f.flags, f.body, err)
		}
	}
}

// mayAnswer says what is wrong with a packet of a server's.
func mayAnswer(r *reading, f frame) (err error) {
	defer func() {
		if cause := recover(); cause != nil {
			err = fmt.Errorf("can't be read: %v", cause)
		}
	}()
	if r.version == 0 { // what is written to an unknown level nobody can say
		if f.kind != packets.Connack || len(f.body) < 2 || f.body[1] == 0 {
			return errors.New("to a client of an unknown level")
		}
		return nil
	}
	want := byte(0)
	if f.kind == packets.Pubrel {
		want = 2
	}
	if f.kind != packets.Publish && f.flags != want {
		return errors.New("flags are reserved")
	}
	most := int(r.connect.Properties.MaximumPacketSize)
	if size := len(appendFrame(nil, 0, f.body)); most > 0 && size > most { // [MQTT-3.1.2-24]
		return fmt.Errorf("%d bytes, the client's Maximum Packet Size is %d", size, most)
	}
	pk := packets.Packet{ProtocolVersion: r.version, FixedHeader: packets.FixedHeader{
		Type: f.kind, Qos: f.qos(), Dup: f.dup(), Retain: f.flags&1 == 1, Remaining: len(f.body),
	}}
	body := bytes.Clone(f.body) // what is decoded may change it
	switch f.kind {
	case packets.Connack:
		err = pk.ConnackDecode(body)
	case packets.Publish:
		err = pk.PublishDecode(body)
		if err == nil {
			err = mayPublish(&pk)
		}
	case packets.Puback:
		err = pk.PubackDecode(body)
	case packets.Pubrec:
		err = pk.PubrecDecode(body)
	case packets.Pubrel:
		err = pk.PubrelDecode(body)
	case packets.Pubcomp:
		err = pk.PubcompDecode(body)
	case packets.Suback:
		err = pk.SubackDecode(body)
	case packets.Unsuback:
		if r.version == 5 {
			err = pk.UnsubackDecode(body)
		}
	case packets.Pingresp:
		if len(body) > 0 {
			err = errors.New("has a body")
		}
	case packets.Disconnect:
		if r.version < 5 {
			return errors.New("servers of this version have no DISCONNECT")
		}
		err = pk.DisconnectDecode(body)
	default:
		return errors.New("not for servers")
	}
	if err != nil {
		return err
	}
	codes, err := reasons(r.version, f)
	if err != nil {
		return err
	}
	table := allowed[f.kind]
	if r.version < 5 {
		table = map[byte]string{packets.Connack: "\x00\x01\x02\x03\x04\x05", packets.Suback: "\x00\x01\x02\x80"}[f.kind]
	}
	for _, code := range codes {
		if strings.IndexByte(table, code) < 0 {
			return fmt.Errorf("reason code %#x", code)
		}
	}
	props := &pk.Properties
	if r.connect.Properties.RequestProblemInfoFlag && r.connect.Properties.RequestProblemInfo == 0 { // [MQTT-3.1.2-29]
		switch f.kind {
		case packets.Publish, packets.Connack, packets.Disconnect:
		default:
			if props.ReasonString != "" || len(props.User) > 0 {
				return errors.New("has problem information, which the client doesn't want")
			}
		}
	}
	if f.kind == packets.Connack && pk.SessionPresent {
		return errors.New("there is no session") // earlier inputs' have been ended
	}
	return nil
}

// mayPublish says what is wrong with a PUBLISH of a server's, beyond its form.
func mayPublish(pk *packets.Packet) error {
	switch {
	case pk.FixedHeader.Qos > 2:
		return errors.New("QoS 3")
	case pk.FixedHeader.Qos == 0 && pk.FixedHeader.Dup:
		return errors.New("DUP at QoS 0") // [MQTT-3.3.1-2]
	case pk.FixedHeader.Qos > 0 && pk.PacketID == 0:
		return errors.New("packet identifier 0") // [MQTT-2.2.1-4]
	case pk.TopicName == "" || strings.ContainsAny(pk.TopicName, "+#\x00") || !utf8.ValidString(pk.TopicName):
		return fmt.Errorf("topic name %q", pk.TopicName)
	case pk.Properties.TopicAliasFlag:
		return errors.New("topic alias, though the server uses none")
	}
	return nil
}

// reasons are the reason codes of a packet, of which every byte has to belong to a field.
func reasons(version byte, f frame) ([]byte, error) {
	b := f.body
	head, codes := 0, 1 // bytes before the reason code, and whether it stands before the properties
	switch f.kind {
	case packets.Publish, packets.Pingresp:
		return nil, nil
	case packets.Connack:
		if len(b) < 2 || b[0] > 1 {
			return nil, fmt.Errorf("acknowledge flags: %w", errShort)
		}
		head = 1
	case packets.Disconnect:
		if len(b) == 0 {
			return nil, nil
		}
	case packets.Suback, packets.Unsuback:
		head, codes = 2, 0
	default:
		head = 2
		if len(b) == 2 {
			return nil, nil
		}
	}
	if f.kind != packets.Connack && f.kind != packets.Disconnect && (len(b) < 2 || b[0]|b[1] == 0) {
		return nil, errors.New("no packet identifier")
	}
	if version < 5 {
		switch {
		case f.kind == packets.Connack && len(b) == 2:
			return b[1:], nil
		case f.kind == packets.Suback && len(b) > 2:
			return b[2:], nil
		case f.kind == packets.Unsuback && len(b) == 2:
			return nil, nil
		}
		return nil, fmt.Errorf("%d bytes", len(b))
	}
	first := b[head : head+codes]
	b = b[head+codes:]
	if len(b) == 0 && codes == 1 && f.kind != packets.Connack {
		return first, nil // the properties may be left out
	}
	size, n := binary.Uvarint(b)
	if n <= 0 || n > 4 || uint64(len(b)-n) < size {
		return nil, fmt.Errorf("length of the properties: %w", errShort)
	}
	b = b[n+int(size):]
	if codes == 1 {
		if len(b) > 0 {
			return nil, fmt.Errorf("%d bytes after the last field", len(b))
		}
		return first, nil
	}
	if len(b) == 0 {
		return nil, errors.New("no reason codes")
	}
	return b, nil
}

// allocatedSoFar is how many bytes the process has allocated so far.
func allocatedSoFar() uint64 {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.TotalAlloc
}

// preludes are what goes before the bytes of an input.
var preludes = [][]byte{
	nil,
	framed(0x10, "\x00\x06MQIsdp\x03\x02\x00\x3c\x00\x04"+fuzzID),
	appendConnect(nil, 4, fuzzID, true, 60),
	appendConnect(nil, 5, fuzzID, true, 60),
	slices.Concat(
		// A session of five minutes, topic aliases, a retained will of QoS 1; the client takes two messages at a time.
		framed(0x10, "\x00\x04MQTT\x05\x2c\x00\x3c"+"\x0b\x11\x00\x00\x01\x2c\x21\x00\x02\x22\x00\x08"+"\x00\x04"+fuzzID+
			"\x00"+"\x00\x06will/x"+"\x00\x04gone"),
		framed(0x82, "\x00\x01\x02\x0b\x07"+"\x00\x01#\x02"+"\x00\x06will/+\x19"+"\x00\x0a$share/g/#\x01"+"\x00\x06$SYS/#\x00"),
		appendPublish(nil, 5, "kept/1", 2, false, 1, []byte("x")),
	),
}

// fullBit of an input's first argument says that the client closes its side altogether.
const fullBit = 0x80

// FuzzConnection sends any bytes, on a connection that is fresh or that has a client. No input ends the process, keeps the witness
// waiting, leaves anything behind, is answered with what no server may send, or makes the process allocate for
// somebody who is not authenticated.
func FuzzConnection(f *testing.F) {
	for how := range byte(len(preludes)) {
		version := []byte{4, 3, 4, 5, 5}[how]
		for _, c := range sentByClients {
			if c.version == version || how == 0 {
				f.Add(how, uint16(0), framed(c.first, c.body))
			}
		}
		f.Add(how, uint16(1), flow(version))
		f.Add(how|fullBit, uint16(0), flow(version))
		f.Add(how, uint16(7), slices.Concat(validPackets(version)...))
		f.Add(how, uint16(0), slices.Concat(validPackets(version)[1:]...))
		for _, length := range []string{"\x00", "\x7f", "\xff\x7f", "\xff\xff\x7f", "\xff\xff\xff\x7f", "\xff\xff\xff\xff", "\x80\x80\x80\x80\x01", "\x80\x00"} {
			f.Add(how, uint16(0), []byte("\x10"+length+"\x00\x04MQTT\x05"))
			f.Add(how, uint16(0), []byte("\x30"+length+"\x00\x01a"))
		}
	}
	for kind, cases := range packets.TPacketData {
		for _, c := range cases {
			how := byte(2)
			if kind == packets.Connect {
				how = 0
			} else if c.Packet != nil && c.Packet.ProtocolVersion == 5 {
				how = 3
			}
			f.Add(how, uint16(0), c.RawBytes)
		}
	}
	// A CONNECT as large as may be, of what costs most: user properties.
	user := strings.Repeat("\x26\x00\x00\x00\x00", 13_000)
	props := string(binary.AppendUvarint(nil, uint64(len(user)))) + user
	// Cut short; of a level that there is not; and whole, but refused by the server since its will is empty.
	f.Add(byte(0), uint16(4096), framed(0x10, "\x00\x04MQTT\x05\x02\x00\x3c"+props))
	f.Add(byte(0), uint16(4096), framed(0x10, "\x00\x04MQTT\x06\x02\x00\x3c"+props+"\x00\x01c"))
	f.Add(byte(0), uint16(4096), framed(0x10, "\x00\x04MQTT\x05\x06\x00\x3c"+props+"\x00\x01c"+"\x00\x00\x01w\x00\x00"))
	f.Add(byte(0), uint16(4096), framed(0x10, "\x00\x04MQTT\x04\x82\x00\x3c\x00\x01c"+strings.Repeat("x", 60_000)))
	f.Add(byte(3), uint16(0), appendPublish(nil, 5, "a", 1, false, 1, make([]byte, fuzzPacket-10)))
	f.Add(byte(3), uint16(0), appendPublish(nil, 5, "a", 1, false, 1, make([]byte, fuzzPacket)))

	z := newFuzzed(f)
	f.Fuzz(func(t *testing.T, how byte, chunk uint16, input []byte) {
		input = input[:min(len(input), fuzzInput)]
		prelude := preludes[int(how&^fullBit)%len(preludes)]
		stream := slices.Concat(prelude, input)
		r := understand(stream)
		end := halfClose
		switch {
		case r.ends != "":
			end = stay
		case how&fullBit != 0 && prelude != nil: // else an identifier that the server has assigned would be lost
			end = fullClose
		}
		z.begin(t)
		before := allocatedSoFar()
		h := z.converse(t, stream, int(chunk), end)
		cost := allocatedSoFar() - before
		if end != fullClose {
			wantAnswers(t, &r, h.frames)
			// A connection that is refused is closed with what has not been read: then TCP says that it was reset.
			if h.err != nil && !(end == stay && errors.Is(h.err, syscall.ECONNRESET)) {
				t.Fatalf("%v; expected of the stream: %q", h.err, r.ends)
			}
		}
		admitted := end == fullClose || accepts(h.frames)
		limit := uint64(len(stream)*allocFactor + allocBase)
		for range 5 { // what else the process does is counted with it: the least of some tries is the input's
			if admitted || cost <= limit {
				break
			}
			z.wantQuiet(t, r.left)
			z.begin(t)
			before := allocatedSoFar()
			z.converse(t, stream, int(chunk), end)
			cost = min(cost, allocatedSoFar()-before)
		}
		if !admitted && cost > limit {
			t.Fatalf("%d bytes of somebody not authenticated have cost %d, at most %d are allowed", len(stream), cost, limit)
		}
		r.early = end == fullClose
		if admitted || end == stay { // a CONNACK may be lost with a reset
			var connack frame
			if len(h.frames) > 0 {
				connack = h.frames[0]
			}
			r.sessions = r.outlives(connack)
		}
		z.wantQuiet(t, r.left)
	})
}

// flow is a client's side of everything that it can do, in a sensible order.
func flow(version byte) []byte {
	var props []byte
	if version == 5 {
		props = []byte{0}
	}
	sub := func(filter string, options byte) []byte {
		return appendFrame(nil, 0x82, []byte{0, 9}, props, text(filter), []byte{options})
	}
	out := slices.Concat(
		sub("flow/#", 2), sub("$share/g/flow/+", 1), sub("$share/h/#", 0), sub("$SYS/#", 0), sub("#", 1), sub("+/+", 0),
		appendPublish(nil, version, "flow/0", 0, false, 0, []byte("zero")),
		appendPublish(nil, version, "flow/1", 1, false, 5, []byte("one")),
		appendPublish(nil, version, "flow/2", 2, false, 6, []byte("two")),
		appendPublish(nil, version, "flow/2", 2, true, 6, []byte("two")),
		appendFrame(nil, 0x33, text("flow/kept"), []byte{0, 5}, props, []byte("kept")),
		appendPublish(nil, version, "$SYS/broker/time", 0, false, 0, []byte("x")),
		appendPublish(nil, version, "fleet/v7/telemetry", 1, false, 7, []byte(braking)),
		appendAck(nil, packets.Pubrel, 6), appendAck(nil, packets.Pubrel, 77),
		appendAck(nil, packets.Puback, 1), appendAck(nil, packets.Pubrec, 2), appendAck(nil, packets.Pubcomp, 2), appendAck(nil, packets.Pubrec, 99),
		appendFrame(nil, 0xa2, []byte{0, 9}, props, text("flow/#"), text("$share/g/flow/+"), text("#")),
		pingreq,
	)
	if version == 5 {
		out = slices.Concat(out,
			framed(0x30, "\x00\x06flow/a\x03\x23\x00\x01first"), framed(0x30, "\x00\x00\x03\x23\x00\x01again"),
			framed(0x32, "\x00\x00\x00\x08\x03\x23\x00\x10unknown"))
	}
	return append(out, packets.Disconnect<<4, 0)
}

// choices turns the bytes of an input into decisions. When they are used up all that follows is 0.
type choices struct{ rest []byte }

func (c *choices) below(n int) int {
	if len(c.rest) == 0 {
		return 0
	}
	b := c.rest[0]
	c.rest = c.rest[1:]
	return int(b) % n
}

func (c *choices) one(in string) byte { return in[c.below(len(in))] }

// script is a client's side of a connection that keeps to the protocol but where it says so, and what the server owes it.
type script struct {
	reading
	out []byte

	owed     map[byte][]answer // by packet type, in the order of what they answer
	released []uint16          // packet identifiers of PUBRECs: any PUBREL is for one of them
	taken    int               // how many messages of QoS 1 and 2 the client has acknowledged, at most
	held     bool              // acknowledgements may wait for a commit
	code     byte              // of the DISCONNECT that a violation of the protocol is answered with; 0: there is none

	open       map[uint16]bool // QoS 2 messages of the client's that are not released
	aliases    map[byte]string // that the client has set
	subscribed map[string]bool
}

// answer is what a packet from the server has to say.
type answer struct {
	id    uint16
	codes int    // how many reason codes SUBACK and UNSUBACK have
	want  string // and which, where that is known
}

// announcedMaximum is the one that the server announces.
const announcedMaximum = 1024

// Topic filters, the first that are valid, and topic names. Of $SYS and $share there is none: the server ignores what is published
// there, as it may, but doesn't acknowledge it either.
var (
	fuzzFilters = []string{
		"a", "a/#", "+/b", "#", "$share/g/a/+", "a//b", "$share/g/#", "+", "/", "fleet/+/telemetry", "$SYS/broker/#", "$share/h/a",
		"#/a", "$share/g", "", "$share", "a/#/b",
	}
	fuzzTopics = []string{"a", "a/b", "a//b", "/", "fleet/v7/telemetry", "traced/x", "$own/x", "é/b"}
)

const validFilters = 12

func (s *script) owe(kind byte, a answer) { s.owed[kind] = append(s.owed[kind], a) }

// maxSteps bounds the packets of a script.
const maxSteps = 64

// compose makes a script.
func compose(input []byte) *script {
	c := &choices{input}
	s := &script{
		owed: make(map[byte][]answer), open: make(map[uint16]bool), aliases: make(map[byte]string), subscribed: make(map[string]bool),
		reading: reading{left: left{retained: make(map[string]bool)}},
	}
	s.connectAs(c)
	for step := 0; len(c.rest) > 0 && step < maxSteps && s.ends == ""; step++ {
		switch c.below(12) {
		case 0, 1:
			s.subscribe(c)
		case 2:
			s.unsubscribe(c)
		case 3, 4, 5:
			s.publish(c)
		case 6:
			s.release(c)
		case 7, 8:
			s.acknowledge(c)
		case 9:
			s.ping()
		case 10:
			s.burst(c)
		case 11:
			s.leave(c)
		}
	}
	if s.ends == "" {
		s.ping() // when it is answered so is all that waits for no commit
	}
	return s
}

func (s *script) ping() {
	s.out = append(s.out, pingreq...)
	s.owe(packets.Pingresp, answer{})
}

// props encodes properties if the version has them.
func (s *script) props(p string) []byte {
	if s.version < 5 {
		return nil
	}
	return append(binary.AppendUvarint(nil, uint64(len(p))), p...)
}

func (s *script) user(c *choices) string {
	return strings.Repeat("\x26\x00\x01k\x00\x05value", c.below(3))
}

func (s *script) connectAs(c *choices) {
	s.version = c.one("\x05\x04\x05\x03\x05\x04\x05\x05")
	name := "\x00\x04MQTT"
	if s.version == 3 {
		name = "\x00\x06MQIsdp"
	}
	flags, lasting := byte(2), c.below(2) == 1
	var props string
	if lasting {
		flags, props = byte(0), "\x11\x00\x00\x01\x2c"
		s.connect.Properties.SessionExpiryInterval = 300
	}
	s.connect.Connect.Clean, s.connect.Connect.ClientIdentifier = !lasting, fuzzID
	if n := []uint16{0, 1, 2, 100}[c.below(4)]; n > 0 {
		s.connect.Properties.ReceiveMaximum = n
		props += "\x21" + string(binary.BigEndian.AppendUint16(nil, n))
	}
	if c.below(4) == 1 {
		s.connect.Properties.MaximumPacketSize = 128
		props += "\x27\x00\x00\x00\x80"
	}
	if c.below(4) == 1 {
		s.connect.Properties.RequestProblemInfoFlag = true
		props += "\x17\x00"
	}
	props += "\x22\x00\x04" + s.user(c)
	var will []byte
	if c.below(3) == 1 {
		qos := byte(c.below(3))
		flags |= 4 | qos<<3
		topic := fuzzTopics[c.below(len(fuzzTopics))]
		if c.below(2) == 1 {
			flags |= 0x20
			s.retained[topic] = true
		}
		will = slices.Concat(s.props("\x18\x00\x00\x00\x01"), text(topic), text("gone"))
	}
	if s.version < 5 {
		s.connect.Properties = packets.Properties{}
	}
	s.out = appendFrame(s.out, 0x10, []byte(name), []byte{s.version, flags, 0, 60}, s.props(props), text(fuzzID), will)
	s.owe(packets.Connack, answer{})
}

// id is a packet identifier of few, so that they meet.
func (c *choices) id() uint16 { return uint16(1 + c.below(8)) }

func (s *script) subscribe(c *choices) {
	id := c.id()
	var props string
	if c.below(3) == 1 {
		props = "\x0b" + c.subscriptionID()
	}
	head := slices.Concat(binary.BigEndian.AppendUint16(nil, id), s.props(props+s.user(c)))
	a := answer{id: id, codes: 1 + c.below(4)}
	var codes, filters []byte
	for range a.codes {
		n := c.below(len(fuzzFilters))
		filter, options := fuzzFilters[n], c.one("\x00\x01\x02")
		code := options
		if s.version == 5 {
			options |= c.one("\x00\x04\x08\x10\x20\x1c")
			if strings.HasPrefix(filter, "$share/") {
				options &^= 4 // [MQTT-3.8.3-4]
			}
		}
		switch {
		case s.open[id]: // it may not be used again yet (MQTT 5, 3.9.3); mochi refuses all of the filters
			code = 0x91
		case n >= validFilters:
			code = 0x8f
		default:
			s.subscribed[filter] = true
		}
		if s.version < 5 && code > 2 {
			code = 0x80
		}
		filters, codes = append(append(filters, text(filter)...), options), append(codes, code)
	}
	a.want = string(codes)
	s.out = appendFrame(s.out, 0x82, head, filters)
	s.owe(packets.Suback, a)
}

func (c *choices) subscriptionID() string {
	return []string{"\x01", "\x80\x01", "\xff\xff\xff\x7f"}[c.below(3)]
}

func (s *script) unsubscribe(c *choices) {
	a := answer{id: c.id(), codes: 1 + c.below(4)}
	head := slices.Concat(binary.BigEndian.AppendUint16(nil, a.id), s.props(s.user(c)))
	var filters []byte
	for range a.codes {
		filter := fuzzFilters[c.below(len(fuzzFilters))]
		if !s.open[a.id] {
			delete(s.subscribed, filter)
		}
		filters = append(filters, text(filter)...)
	}
	s.out = appendFrame(s.out, 0xa2, head, filters)
	if s.version < 5 {
		a.codes = 0
	}
	s.owe(packets.Unsuback, a)
}

func (s *script) publish(c *choices) {
	qos, retain := byte(c.below(3)), byte(c.below(2))
	topic, id := fuzzTopics[c.below(len(fuzzTopics))], c.id()
	props := []string{"", "\x01\x01", "\x02\x00\x00\x00\x09", "\x03\x00\x01j\x08\x00\x01r\x09\x00\x01c"}[c.below(4)] + s.user(c)
	payload := []string{braking, "", "x", strings.Repeat("long ", 60), `{"n":1}`}[c.below(5)]
	first := packets.Publish<<4 | qos<<1 | retain
	if s.open[id] {
		if qos == 1 {
			id += 8 // its identifier is in use [MQTT-2.2.1-3]
		} else if qos == 2 {
			first |= 8 // sent again
		}
	}
	sent := topic
	if alias := byte(c.below(24)); s.version == 5 && alias > 0 && alias < 20 {
		props += "\x23\x00" + string(alias)
		if c.below(2) == 1 {
			sent = ""
			topic = s.aliases[alias]
		}
		switch {
		case alias > 16: // the server has announced 16
			s.violate(0x94)
		case topic == "":
			s.violate(0x82)
		default:
			s.aliases[alias] = topic
		}
	}
	var head []byte
	if qos > 0 {
		head = binary.BigEndian.AppendUint16(nil, id)
	}
	s.out = appendFrame(s.out, first, text(sent), head, s.props(props), []byte(payload))
	if s.ends != "" {
		return
	}
	if s.published(qos, id); s.ends != "" {
		return
	}
	if retain == 1 {
		s.retained[topic] = true
	}
	if qos > 0 && (strings.HasPrefix(topic, "fleet/") || strings.HasPrefix(topic, "traced/")) {
		s.held = true // and what comes after it
	}
}

// published notes what a PUBLISH is answered with.
func (s *script) published(qos byte, id uint16) {
	if s.version == 5 && qos > 0 && !s.open[id] && len(s.open) == announcedMaximum {
		s.violate(0x93) // [MQTT-3.3.4-7]
		return
	}
	switch qos {
	case 1:
		s.owe(packets.Puback, answer{id: id})
	case 2:
		s.open[id] = true
		s.owe(packets.Pubrec, answer{id: id})
	}
}

// violate notes that the packet that follows breaks the protocol: the server has to end the connection at it.
func (s *script) violate(code byte) {
	s.ends = fmt.Sprintf("DISCONNECT %#x", code)
	if s.version == 5 {
		s.code = code
	}
}

func (s *script) release(c *choices) {
	id := c.id()
	code := c.one("\x00\x00\x00\x92")
	pk := appendAck(nil, packets.Pubrel, id)
	if s.version == 5 && (code != 0 || c.below(2) == 1) {
		pk = appendFrame(nil, 0x62, pk[2:], []byte{code})
	}
	s.out = append(s.out, pk...)
	delete(s.open, id)
	s.owe(packets.Pubcomp, answer{id: id})
}

// acknowledge sends what may or may not fit a message of the server's.
func (s *script) acknowledge(c *choices) {
	kind, id := c.one("\x04\x05\x07"), c.id()
	code := byte(0)
	if kind != packets.Pubcomp {
		code = c.one("\x00\x00\x10\x87")
	}
	pk := appendAck(nil, kind, id)
	if s.version == 5 && code > 0 {
		pk = appendFrame(nil, kind<<4, pk[2:], []byte{code}, []byte{0})
	}
	s.out = append(s.out, pk...)
	if kind == packets.Pubrec {
		s.released = append(s.released, id)
	}
	s.taken++
}

// burst has some QoS 2 messages under way, now and then as many as the server allows, or one more.
func (s *script) burst(c *choices) {
	n := c.below(16)
	switch n {
	case 0, 1:
		n += announcedMaximum - len(s.open)
	default:
		n = min(n, announcedMaximum-len(s.open))
	}
	for id := uint16(1000); n > 0 && s.ends == ""; id++ {
		if s.open[id] {
			continue
		}
		s.out = appendPublish(s.out, s.version, "burst", 2, false, id, nil)
		s.published(2, id)
		n--
	}
}

// leave ends the connection: with DISCONNECT, or a CONNECT that must not come.
func (s *script) leave(c *choices) {
	if c.below(3) == 2 {
		s.out = appendConnect(s.out, s.version, fuzzID, true, 60)
		s.violate(0x82)
		return
	}
	s.ends = "DISCONNECT"
	if s.version < 5 {
		s.out = append(s.out, 0xe0, 0)
		return
	}
	props := ""
	switch c.below(4) {
	case 1:
		props = "\x11\x00\x00\x00\x0a"
		if s.connect.Properties.SessionExpiryInterval == 0 {
			s.violate(0x82) // MQTT 5, 3.14.2.2.2
		}
	case 2:
		props = "\x1f\x00\x03why" + s.user(c)
	}
	s.out = appendFrame(s.out, 0xe0, []byte{c.one("\x00\x04\x80")}, s.props(props))
}

// FuzzPackets sends packets that are well formed, in any order, and checks that the client gets what it is owed.
func FuzzPackets(f *testing.F) {
	for n := range 48 { // each kind of packet after each other, with all sorts of choices
		var input []byte
		for i := range 120 {
			input = append(input, byte(i*i*(n+1)+7*n+i))
		}
		f.Add(input)
	}
	const v5, v4 = "\x00\x00\x00\x00\x00\x00\x00", "\x01\x00\x00\x00\x00\x00\x00"
	const qos0, qos2 = "\x03\x00\x00\x00\x00\x00\x00\x01\x00", "\x03\x02\x00\x00\x00\x00\x00\x01\x00"
	for _, input := range []string{
		v5 + "\x0a\x00" + qos0 + qos2,    // as many as may be under way
		v5 + "\x0a\x01", v4 + "\x0a\x01", // one more
		v5 + "\x03\x00\x00\x00\x00\x00\x00\x01\x05\x01", // an unknown alias
		v5 + qos2 + "\x06\x00\x03" + "\x06\x00\x00",     // released with a reason code
		v4 + qos2 + "\x00\x00\x00\x00\x00\x00\x00",      // an identifier that is in use
		v5 + "\x0b\x02", v4 + "\x0b\x02", v5 + "\x0b\x00\x01\x00", // a second CONNECT; another expiry at the end
	} {
		f.Add([]byte(input))
	}

	z := newFuzzed(f)
	f.Fuzz(func(t *testing.T, input []byte) {
		s := compose(input)
		z.begin(t)
		h := z.play(t, s)
		wantAnswers(t, &s.reading, h.frames)
		s.wantOwed(t, h)
		s.sessions = s.outlives(frame{})
		z.wantQuiet(t, s.left)
	})
}

// play sends a script, and closes when all that is owed has come, or the server closes.
func (z *fuzzed) play(t *testing.T, s *script) heard {
	t.Helper()
	p := z.dial(t, s.version)
	defer p.Close()
	missing := 0
	for _, answers := range s.owed {
		missing += len(answers)
	}
	result := make(chan heard, 1)
	go func() {
		got := make(map[byte]int)
		result <- listen(p, func(f frame) {
			if got[f.kind]++; got[f.kind] > len(s.owed[f.kind]) {
				return
			}
			if missing--; missing == 0 && s.ends == "" {
				_ = p.Conn.(*net.TCPConn).CloseWrite()
			}
		})
	}()
	if err := z.ask(); err != nil {
		t.Fatalf("the witness is not served: %v", err)
	}
	_, _ = p.Write(s.out) // an error shows in what is heard
	if err := z.answered(); err != nil {
		t.Fatal(err)
	}
	return <-result
}

// wantOwed fails unless the server has answered each packet, in order, and nothing else.
func (s *script) wantOwed(t *testing.T, h heard) {
	t.Helper()
	cutOff := s.version < 5 && s.ends != "" && s.ends != "DISCONNECT" // no packet says it, and the rest may be lost
	if h.err != nil && !(cutOff && errors.Is(h.err, syscall.ECONNRESET)) {
		t.Fatalf("%v; the script ends with %q; heard %s", h.err, s.ends, names(h.frames))
	}
	got := make(map[byte]int)
	inflight := 0
	for i, f := range h.frames {
		switch f.kind {
		case packets.Publish:
			if f.qos() > 0 {
				inflight++
			}
			continue
		case packets.Pubrel:
			id, _, err := f.ack()
			if err != nil || !slices.Contains(s.released, id) {
				t.Fatalf("PUBREL for %d, without PUBREC; %v", id, err)
			}
			continue
		case packets.Disconnect:
			if i < len(h.frames)-1 || len(f.body) == 0 || f.body[0] != s.code {
				t.Fatalf("DISCONNECT %x, want code %#x; heard %s", f.body, s.code, names(h.frames))
			}
			continue
		}
		n := got[f.kind]
		got[f.kind]++
		if n >= len(s.owed[f.kind]) {
			t.Fatalf("more %s than are owed; heard %s", packets.PacketNames[f.kind], names(h.frames))
		}
		s.wantAnswer(t, f, s.owed[f.kind][n])
	}
	for kind, answers := range s.owed {
		mayBeHeld := s.ends != "" && s.held && (kind == packets.Puback || kind == packets.Pubrec)
		if got[kind] < len(answers) && !mayBeHeld && !cutOff {
			t.Fatalf("%d %s, %d are owed; the script ends with %q; heard %s",
				got[kind], packets.PacketNames[kind], len(answers), s.ends, names(h.frames))
		}
	}
	if last := len(h.frames) - 1; s.code != 0 && h.frames[last].kind != packets.Disconnect {
		t.Fatalf("no DISCONNECT %#x; heard %s", s.code, names(h.frames))
	}
	if most := int(s.connect.Properties.ReceiveMaximum); most > 0 && inflight > most+s.taken {
		t.Fatalf("%d messages, at most %d were acknowledged, the client's Receive Maximum is %d [MQTT-3.3.4-9]", inflight, s.taken, most)
	}
}

func (s *script) wantAnswer(t *testing.T, f frame, want answer) {
	t.Helper()
	name := packets.PacketNames[f.kind]
	switch f.kind {
	case packets.Connack:
		if f.body[1] != 0 {
			t.Fatalf("CONNACK %x", f.body)
		}
	case packets.Puback, packets.Pubrec, packets.Pubcomp, packets.Suback, packets.Unsuback:
		if id := binary.BigEndian.Uint16(f.body); id != want.id {
			t.Fatalf("%s for %d, want %d", name, id, want.id)
		}
		codes, err := reasons(s.version, f)
		if err != nil {
			t.Fatal(err)
		}
		switch {
		case f.kind == packets.Puback || f.kind == packets.Pubrec:
			if len(codes) > 0 && codes[0] >= 0x80 {
				t.Fatalf("%s %#x", name, codes)
			}
		case want.codes != 0 && len(codes) != want.codes:
			t.Fatalf("%s has %d codes, want %d", name, len(codes), want.codes)
		case want.want != "" && string(codes) != want.want:
			t.Fatalf("%s has codes %x, want %x", name, codes, want.want)
		}
	}
}

// names lists packets, as many as can be read.
func names(frames []frame) string {
	var b strings.Builder
	for _, f := range frames[max(0, len(frames)-20):] {
		fmt.Fprintf(&b, "%s %.20x; ", packets.PacketNames[f.kind], f.body)
	}
	return b.String()
}

// TestEveryPacketCutAtEveryByte sends each packet that there is up to each of its bytes, and goes; and each again with a
// remaining length that says that this was all.
func TestEveryPacketCutAtEveryByte(t *testing.T) {
	z := newFuzzed(t)
	for _, c := range sentByClients {
		version := max(c.version, 4)
		if c.version == 3 {
			version = 3
		}
		whole := framed(c.first, c.body)
		prelude := []byte(nil)
		for _, p := range preludes[1:] {
			if c.version != 0 && level(p[2:]) == version {
				prelude = p
			}
		}
		for n := range len(whole) {
			z.cut(t, c.name, slices.Concat(prelude, whole[:n]))
		}
		for n := range len(c.body) {
			z.cut(t, c.name, slices.Concat(prelude, framed(c.first, c.body[:n])))
		}
	}
}

func (z *fuzzed) cut(t *testing.T, name string, stream []byte) {
	t.Helper()
	z.begin(t)
	r := understand(stream)
	end := halfClose
	if r.ends != "" {
		end = stay
	}
	h := z.converse(t, stream, 0, end)
	if h.err != nil && !(end == stay && errors.Is(h.err, syscall.ECONNRESET)) {
		t.Fatalf("%s, %x: %v", name, stream, h.err)
	}
	wantAnswers(t, &r, h.frames)
	var connack frame
	if len(h.frames) > 0 {
		connack = h.frames[0]
	}
	r.sessions = r.outlives(connack)
	z.wantQuiet(t, r.left)
}
