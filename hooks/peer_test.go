package hooks_test

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/mochi-mqtt/server/v2/packets"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/throughline-mqtt/throughline/auth"
	"github.com/throughline-mqtt/throughline/bridge"
	"github.com/throughline-mqtt/throughline/hooks"
	"github.com/throughline-mqtt/throughline/rules"
	"github.com/throughline-mqtt/throughline/tracectx"
	"github.com/throughline-mqtt/throughline/tracectx/skywalking"
)

// peer is as little of an MQTT client as a load needs. Unlike a rawClient it returns its errors, so that it
// can be used in any goroutine, and it leaves nothing behind in the test when it is closed.
type peer struct {
	net.Conn
	r       *bufio.Reader
	version byte
	wait    time.Duration // for a packet that expect wants
	body    []byte        // of the frame that was read last
}

// frame is a packet that a peer has read. The body is overwritten by the next read.
type frame struct {
	kind, flags byte
	body        []byte
}

func dialPeer(address string, version byte) (*peer, error) {
	conn, err := net.DialTimeout("tcp", address, patience)
	if err != nil {
		return nil, err
	}
	return &peer{Conn: conn, r: bufio.NewReader(conn), version: version, wait: patience}, nil
}

// connectPeer dials and connects; present is what CONNACK says of the session.
func connectPeer(address string, version byte, id string, clean bool) (p *peer, present bool, err error) {
	if p, err = dialPeer(address, version); err != nil {
		return nil, false, err
	}
	if present, err = p.connect(id, clean, 60); err != nil {
		p.Close()
		return nil, false, fmt.Errorf("connect as %q: %w", id, err)
	}
	return p, present, nil
}

// connect sends CONNECT and waits for an accepting CONNACK.
func (p *peer) connect(id string, clean bool, keepalive uint16) (present bool, err error) {
	if _, err := p.Write(appendConnect(nil, p.version, id, clean, keepalive)); err != nil {
		return false, err
	}
	f, err := p.expect(packets.Connack)
	if err != nil {
		return false, err
	}
	if len(f.body) < 2 || f.body[1] != 0 {
		return false, fmt.Errorf("CONNACK %x", f.body)
	}
	return f.body[0]&1 == 1, nil
}

func (p *peer) subscribe(filter string, qos byte) error {
	if _, err := p.Write(appendSubscribe(nil, p.version, filter, qos)); err != nil {
		return err
	}
	f, err := p.expect(packets.Suback)
	for f.kind == packets.Publish { // the first messages may come before it (MQTT 5, 3.8.4)
		f, err = p.expect(packets.Suback)
	}
	if err != nil {
		return err
	}
	if code := f.body[len(f.body)-1]; code != qos {
		return fmt.Errorf("subscribe to %s at QoS %d: SUBACK %#x", filter, qos, code)
	}
	return nil
}

// expect reads one packet, which has to be of that kind.
func (p *peer) expect(kind byte) (frame, error) {
	_ = p.SetReadDeadline(time.Now().Add(p.wait))
	f, err := p.read()
	if err == nil && f.kind != kind {
		err = fmt.Errorf("got %s %x, want %s", packets.PacketNames[f.kind], f.body, packets.PacketNames[kind])
	}
	return f, err
}

// read reads one packet. A deadline is for the caller to set.
func (p *peer) read() (frame, error) {
	first, err := p.r.ReadByte()
	if err != nil {
		return frame{}, err
	}
	n, err := binary.ReadUvarint(p.r)
	if err != nil {
		return frame{}, err
	}
	if n > 256<<20 {
		return frame{}, fmt.Errorf("a packet of %d bytes", n)
	}
	if uint64(cap(p.body)) < n {
		p.body = make([]byte, n)
	}
	body := p.body[:n]
	if _, err := io.ReadFull(p.r, body); err != nil {
		return frame{}, err
	}
	return frame{kind: first >> 4, flags: first & 15, body: body}, nil
}

// reset closes the connection so that the server gets an error, and loses what it has not read yet.
func (p *peer) reset() {
	if tcp, ok := p.Conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
	p.Close()
}

var errShort = errors.New("packet is too short")

func (f frame) dup() bool { return f.flags&8 != 0 }
func (f frame) qos() byte { return f.flags >> 1 & 3 }

// ack is the packet identifier and the reason code of PUBACK, PUBREC, PUBREL or PUBCOMP.
func (f frame) ack() (id uint16, code byte, err error) {
	if len(f.body) < 2 {
		return 0, 0, errShort
	}
	if len(f.body) > 2 {
		code = f.body[2]
	}
	return binary.BigEndian.Uint16(f.body), code, nil
}

// publish is what a PUBLISH holds; the payload shares the frame's memory.
func (f frame) publish(version byte) (topic string, id uint16, payload []byte, err error) {
	b := f.body
	if len(b) < 2 || len(b) < 2+int(binary.BigEndian.Uint16(b)) {
		return "", 0, nil, errShort
	}
	n := 2 + int(binary.BigEndian.Uint16(b))
	topic, b = string(b[2:n]), b[n:]
	if f.qos() > 0 {
		if len(b) < 2 {
			return "", 0, nil, errShort
		}
		id, b = binary.BigEndian.Uint16(b), b[2:]
	}
	if version == 5 {
		size, n := binary.Uvarint(b)
		if n <= 0 || uint64(len(b)-n) < size {
			return "", 0, nil, errShort
		}
		b = b[n+int(size):]
	}
	return topic, id, b, nil
}

// appendFrame appends a packet of which the parts are the body. A remaining length is coded as a uvarint is (MQTT 5, 1.5.5).
func appendFrame(to []byte, first byte, parts ...[]byte) []byte {
	n := 0
	for _, p := range parts {
		n += len(p)
	}
	to = binary.AppendUvarint(append(to, first), uint64(n))
	for _, p := range parts {
		to = append(to, p...)
	}
	return to
}

// text is a string as MQTT codes it.
func text(s string) []byte {
	return append(binary.BigEndian.AppendUint16(nil, uint16(len(s))), s...)
}

// appendConnect appends a CONNECT; without clean the session outlives the connection by five minutes.
func appendConnect(to []byte, version byte, id string, clean bool, keepalive uint16) []byte {
	head := []byte{0, 4, 'M', 'Q', 'T', 'T', version, 0, byte(keepalive >> 8), byte(keepalive)}
	if clean {
		head[7] = 2
	}
	if version == 5 {
		if clean {
			head = append(head, 0)
		} else {
			head = append(head, 5, 0x11, 0, 0, 1, 44) // Session Expiry Interval: 300 s
		}
	}
	return appendFrame(to, packets.Connect<<4, head, text(id))
}

func appendSubscribe(to []byte, version byte, filter string, qos byte) []byte {
	head := []byte{0xea, 0x60}
	if version == 5 {
		head = append(head, 0)
	}
	return appendFrame(to, packets.Subscribe<<4|2, head, text(filter), []byte{qos})
}

func appendPublish(to []byte, version byte, topic string, qos byte, dup bool, id uint16, payload []byte) []byte {
	first := packets.Publish<<4 | qos<<1
	if dup {
		first |= 8
	}
	var head [3]byte
	n := 0
	if qos > 0 {
		binary.BigEndian.PutUint16(head[:], id)
		n = 2
	}
	if version == 5 {
		n++ // no properties
	}
	return appendFrame(to, first, text(topic), head[:n], payload)
}

// appendAck appends a PUBACK, PUBREC, PUBREL or PUBCOMP that means success.
func appendAck(to []byte, kind byte, id uint16) []byte {
	first := kind << 4
	if kind == packets.Pubrel {
		first |= 2
	}
	return append(to, first, 2, byte(id>>8), byte(id))
}

var pingreq = []byte{packets.Pingreq << 4, 0}

// served is a server for loads. Unlike start's it keeps neither spans nor records, which would pile up.
type served struct {
	*hooks.Server
	address string
	metrics *prometheus.Registry
	log     *syncBuffer // errors alone
}

func serve(tb testing.TB, appendRecords func([]bridge.Record) (hooks.Commit, error), change ...func(*hooks.Options)) *served {
	tb.Helper()
	file := filepath.Join(tb.TempDir(), "rules.yaml")
	if err := os.WriteFile(file, []byte(ruleFile), 0o600); err != nil {
		tb.Fatal(err)
	}
	set, problems := rules.Load([]string{file}, rules.LoadOptions{})
	if set == nil {
		tb.Fatal(problems)
	}
	x, err := tracectx.NewExtractor(tracectx.Fields{SW8: "sw8", Correlation: "sw8-correlation"})
	if err != nil {
		tb.Fatal(err)
	}
	tracer, err := skywalking.NewTracer(skywalking.Options{Service: "broker", Instance: "broker@test"})
	if err != nil {
		tb.Fatal(err)
	}
	s := &served{metrics: prometheus.NewRegistry(), log: &syncBuffer{}}
	listener := hooks.ListenerOptions{Name: "tcp", Address: "127.0.0.1:0"}
	o := hooks.Options{
		Listeners:  []hooks.ListenerOptions{listener},
		Auth:       auth.NewPolicy(auth.Options{Listeners: []auth.Listener{{Name: "tcp", Address: listener.Address}}}),
		Rules:      func() *rules.Set { return set },
		Append:     appendRecords,
		Extractor:  x,
		Tracer:     tracer,
		Logger:     slog.New(slog.NewTextHandler(s.log, &slog.HandlerOptions{Level: slog.LevelError})),
		Registerer: s.metrics,
	}
	for _, fn := range change {
		fn(&o)
	}
	if s.Server, err = hooks.New(o); err != nil {
		tb.Fatal(err)
	}
	s.address = s.Addresses()[0]
	s.Start()
	return s
}

// sum adds up all series of a metric.
func (s *served) sum(tb testing.TB, name string) (total float64) {
	tb.Helper()
	families, err := s.metrics.Gather()
	if err != nil {
		tb.Fatal(err)
	}
	found := false
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		found = true
		for _, m := range f.GetMetric() {
			total += m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
	}
	if !found {
		tb.Fatalf("no metric %s", name)
	}
	return total
}

// groupQueue is an outbox whose appends share commits as the real one's do, each open until the one before it
// is over. It fails and stalls as it is told to.
type groupQueue struct {
	refuse func() error                  // asked at each append: an error refuses it; nil: never
	flush  func() (time.Duration, error) // asked at each commit: how long it takes and how it ends; nil: well, at once

	mu   sync.Mutex
	open *group // what appends join; nil: the next one opens it

	wake, quit, ended chan struct{}
}

type group struct {
	*commit
	records []bridge.Record
}

// run starts the commits; stored gets what a commit holds before its end is known to anyone. nil: nobody asks.
func (q *groupQueue) run(stored func([]bridge.Record)) {
	q.wake, q.quit, q.ended = make(chan struct{}, 1), make(chan struct{}), make(chan struct{})
	go func() {
		defer close(q.ended)
		for {
			select {
			case <-q.wake:
			case <-q.quit:
				return
			}
			q.mu.Lock()
			g := q.open
			q.open = nil
			q.mu.Unlock()
			if g == nil {
				continue
			}
			var err error
			if q.flush != nil {
				var takes time.Duration
				takes, err = q.flush()
				time.Sleep(takes)
			}
			if err == nil && stored != nil {
				stored(g.records)
			}
			g.end(err)
		}
	}()
}

func (q *groupQueue) stop() {
	close(q.quit)
	<-q.ended
}

func (q *groupQueue) append(records []bridge.Record) (hooks.Commit, error) {
	if q.refuse != nil {
		if err := q.refuse(); err != nil {
			return nil, err
		}
	}
	q.mu.Lock()
	if q.open == nil {
		q.open = &group{commit: pending()}
	}
	g := q.open
	g.records = append(g.records, records...)
	q.mu.Unlock()
	select {
	case q.wake <- struct{}{}:
	default:
	}
	return g.commit, nil
}
