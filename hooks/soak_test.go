package hooks_test

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/throughline-mqtt/throughline/bridge"
	"github.com/throughline-mqtt/throughline/hooks"
)

var (
	soakFor  = flag.Duration("soak", 3*time.Second, "how long the actors of TestSoak go on")
	soakSeed = flag.Uint64("soak-seed", 0, "seed of TestSoak; 0: a random one, which is printed")
)

const (
	// soakGoroutines is how many goroutines more than before there may be once all is over: the runtime's own come and go.
	soakGoroutines = 5
	// soakHeap is how much more memory than before may be in use then, in bytes. A leaked client costs 32 kB, for mochi's
	// queue alone: in CI's half minute one in ten of those that come would be more than this.
	soakHeap = 16 << 20
	// soakPacket is the server's limit on packets. With it a client that reads nothing is sent away at 5 MiB.
	soakPacket = 1 << 20
	// soakDelay is how long an acknowledgement for a steady publisher may take. It says nothing about speed: below the
	// 15 s for which a stalled reader is borne with, it shows that nobody waits for one.
	soakDelay = 12 * time.Second
	// soakReports bounds the lines about one kind of fault; all are counted.
	soakReports = 5
)

// soak is what the actors share. Steady clients are those that a server has no reason ever to disconnect.
type soak struct {
	t       *testing.T
	server  *served
	seed    uint64
	sources []*source

	mu     sync.Mutex
	faults map[string]int             // by kind
	counts map[string]int             // what happened, for the log
	stored map[string]map[string]bool // by client: the vins whose commit has ended well
}

// TestSoak keeps a server under everything at once that clients and disks do to it, and has its steady clients check what they
// are owed. Each actor is seeded; how they interleave is not, so that a seed alone doesn't replay a run.
func TestSoak(t *testing.T) {
	s := &soak{t: t, seed: *soakSeed, faults: make(map[string]int), counts: make(map[string]int), stored: make(map[string]map[string]bool)}
	if s.seed == 0 {
		s.seed = rand.Uint64()
	}
	// Not by t.Log: a panic outside all recovering ends the process without it.
	fmt.Fprintf(os.Stderr, "TestSoak: -soak %v -soak-seed %d\n", *soakFor, s.seed)

	goroutines, heap := runtime.NumGoroutine(), heapInUse()
	queue, space := s.queue()
	queue.run(s.keep)
	s.server = serve(t, queue.append, func(o *hooks.Options) { o.MaxPacketSize, o.Space = soakPacket, space })

	sinks := s.subscribers()
	var subscribers, publishers, chaos sync.WaitGroup
	listening, deafen := context.WithCancel(t.Context())
	defer deafen()
	for _, k := range sinks {
		subscribers.Go(func() { k.run(listening) })
	}
	for _, k := range sinks {
		<-k.ready
	}
	ctx, stop := context.WithTimeout(t.Context(), *soakFor)
	defer stop()
	for _, src := range s.sources {
		publishers.Go(func() { s.publish(ctx, src) })
	}
	actor := uint64(100)
	start := func(n int, act func(context.Context, *rand.Rand, int)) {
		for i := range n {
			actor++
			rng := rand.New(rand.NewPCG(s.seed, actor))
			chaos.Go(func() { act(ctx, rng, i) })
		}
	}
	start(len(vehicles), s.vehicle)
	start(1, s.storm)
	start(1, s.takeovers)
	start(3, s.stalledReader)
	start(2, s.malformed)
	start(2, s.slowWriter)
	start(1, s.vanishing)

	publishers.Wait()
	chaos.Wait()
	s.awaitDeliveries(sinks)
	deafen()
	subscribers.Wait()
	for _, k := range sinks {
		k.report()
	}
	s.sweep()
	s.t.Logf("dropped by the server: %v; stalled connections: %v; refused frames: %v; refused publishes: %v",
		s.server.sum(t, "throughline_mqtt_messages_dropped_total"), s.server.sum(t, "throughline_connections_stalled_total"),
		s.server.sum(t, "throughline_frames_refused_total"), s.server.sum(t, "throughline_publishes_refused_total"))
	for _, name := range []string{"throughline_connection_panics_total", "throughline_hook_panics_total"} {
		if n := s.server.sum(t, name); n != 0 {
			s.fault("panic", "%s is %v", name, n)
		}
	}

	closing, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := s.server.Close(closing); err != nil {
		s.fault("close", "%v", err)
	}
	queue.stop()
	if n := s.server.sum(t, "throughline_connections"); n != 0 {
		s.fault("close", "%v connections are open after Close", n)
	}
	s.wantGone(goroutines, heap)

	s.t.Logf("happened: %v", s.counts)
	if len(s.faults) > 0 {
		log := s.server.log.String()
		s.t.Errorf("seed %d, faults: %v\nthe server's errors:\n%s", s.seed, s.faults, log[:min(len(log), 16<<10)])
	}
	runtime.KeepAlive(s.server) // what it has not let go of counts
}

// fault reports what a check found.
func (s *soak) fault(check, format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults[check]++
	if s.faults[check] <= soakReports {
		s.t.Errorf(check+": "+format, args...)
	}
}

func (s *soak) count(what string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.counts[what]++
}

// wantGone waits until goroutines and heap are as before, nearly.
func (s *soak) wantGone(goroutines int, heap uint64) {
	left := 0
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if left = runtime.NumGoroutine(); left <= goroutines+soakGoroutines {
			break
		}
	}
	if left > goroutines+soakGoroutines {
		stacks := make([]byte, 64<<10)
		s.fault("goroutines", "%d are left of %d before\n%s", left, goroutines, stacks[:runtime.Stack(stacks, true)])
	}
	now := heapInUse()
	s.t.Logf("goroutines %d -> %d, heap %d -> %d kB", goroutines, left, heap>>10, now>>10)
	if now > heap+soakHeap {
		s.fault("heap", "%d kB are in use, %d kB before", now>>10, heap>>10)
	}
}

func heapInUse() uint64 {
	runtime.GC()
	runtime.GC() // what the first one's finalizers and pools held
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// sweep ends the sessions that outlive their connections, and waits for the last connection to go: what they hold is no leak.
func (s *soak) sweep() {
	ids := []string{contested}
	for i := range stormSize {
		ids = append(ids, fmt.Sprint("storm-", i))
	}
	for i := range mutants {
		ids = append(ids, fmt.Sprint("mutant-", i))
	}
	for i := range vehicles {
		ids = append(ids, fmt.Sprint("vehicle-", i))
	}
	for _, k := range sinkKinds {
		ids = append(ids, k.name)
	}
	for _, id := range ids {
		p, _, err := connectPeer(s.server.address, 4, id, true)
		if err != nil {
			s.fault("sweep", "%v", err)
			continue
		}
		p.Close()
	}
	for end := time.Now().Add(patience); s.server.sum(s.t, "throughline_connections") > 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			s.fault("sweep", "%v connections stay open that their clients have closed", s.server.sum(s.t, "throughline_connections"))
			return
		}
	}
	s.t.Logf("sessions that no actor owns any more: %v", s.server.sum(s.t, "throughline_mqtt_sessions"))
}

// pauseFor waits, and says whether ctx is still alive.
func pauseFor(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}

// between is a random duration.
func between(rng *rand.Rand, low, high time.Duration) time.Duration {
	return low + time.Duration(rng.Int64N(int64(high-low)))
}

// A source is a steady publisher with a topic of its own. Its messages are its index and a sequence number, padded.
type source struct {
	index        byte
	version, qos byte
	topic        string
	burst, size  int // of at most so many messages, each of so many bytes
	pause        time.Duration
	sent         atomic.Uint64 // those that are acknowledged; at QoS 0 those written
}

// publish sends bursts, and waits for all acknowledgements of each.
func (s *soak) publish(ctx context.Context, src *source) {
	rng := rand.New(rand.NewPCG(s.seed, uint64(src.index)))
	p, _, err := connectPeer(s.server.address, src.version, fmt.Sprint("source-", src.index), true)
	if err != nil {
		s.fault("steady publisher", "%v", err)
		return
	}
	defer p.Close()
	p.wait = soakDelay
	var id uint16
	var slowest time.Duration
	defer func() { s.t.Logf("%s: %d messages, a burst took %v at most", src.topic, src.sent.Load(), slowest) }()
	payload := make([]byte, 9+src.size)
	payload[0] = src.index
	for seq := uint64(1); ctx.Err() == nil; {
		var out []byte
		n := 1 + rng.IntN(src.burst)
		first := id
		for i := range uint64(n) {
			id = after(id)
			binary.BigEndian.PutUint64(payload[1:], seq+i)
			out = appendPublish(out, src.version, src.topic, src.qos, false, id, payload)
		}
		if src.qos == 0 {
			out = append(out, pingreq...)
		}
		began := time.Now()
		if _, err := p.Write(out); err != nil {
			s.fault("steady publisher", "%s: disconnected: %v", src.topic, err)
			return
		}
		err := p.acknowledged(src.qos, first, n)
		slowest = max(slowest, time.Since(began))
		if err != nil {
			s.fault("steady publisher", "%s: %v", src.topic, err)
			return
		}
		seq += uint64(n)
		src.sent.Store(seq - 1)
		pauseFor(ctx, between(rng, src.pause/2, 2*src.pause))
	}
}

// after is the packet identifier that comes after one.
func after(id uint16) uint16 {
	if id++; id == 0 {
		id = 1
	}
	return id
}

// acknowledged waits for the acknowledgements of n publishes, which come in the order of the publishes [MQTT-4.6.0-2].
func (p *peer) acknowledged(qos byte, last uint16, n int) error {
	if qos == 0 {
		_, err := p.expect(packets.Pingresp)
		return err
	}
	kinds := []byte{packets.Puback}
	if qos == 2 {
		kinds = []byte{packets.Pubrec, packets.Pubcomp}
	}
	for _, kind := range kinds {
		id := last
		var rel []byte
		for range n {
			id = after(id)
			f, err := p.expect(kind)
			if err != nil {
				return err
			}
			switch got, code, err := f.ack(); {
			case err != nil:
				return err
			case code >= 0x80:
				return fmt.Errorf("%s with reason code %#x", packets.PacketNames[kind], code)
			case got != id:
				return fmt.Errorf("%s for %d, want %d", packets.PacketNames[kind], got, id)
			}
			if kind == packets.Pubrec {
				rel = appendAck(rel, packets.Pubrel, id)
			}
		}
		if _, err := p.Write(rel); err != nil {
			return err
		}
	}
	return nil
}

// A sink is a subscriber that checks what it gets.
type sink struct {
	*soak
	sinkKind
	index uint64
	ready chan struct{} // closed when it has subscribed

	received map[uint16]bool // QoS 2: packet identifiers with PUBREC but no PUBREL yet

	mu   sync.Mutex
	from []progress // by source
}

type sinkKind struct {
	name    string
	version byte
	clean   bool
	leaves  bool // it disconnects and comes back, which needs a session
	filter  string
}

var sinkKinds = []sinkKind{
	{"clean-4", 4, true, false, "steady/#"},
	{"clean-5", 5, true, false, "steady/#"},
	{"session-4", 4, false, false, "steady/#"},
	{"session-5", 5, false, false, "steady/#"},
	{"leaving-4", 4, false, true, "steady/#"},
	{"leaving-5", 5, false, true, "steady/#"},
	{"beside-the-stalled", 5, true, false, "flood/#"},
}

// progress is what a subscriber has of a source.
type progress struct {
	next    uint64          // the highest sequence number seen, and one
	missing map[uint64]bool // those before it that have not come
	got     uint64
}

// subscribers makes the sources and their subscribers.
func (s *soak) subscribers() []*sink {
	for i, c := range []struct{ version, qos byte }{{4, 0}, {4, 1}, {4, 2}, {5, 0}, {5, 1}, {5, 2}} {
		s.sources = append(s.sources, &source{
			index: byte(i), version: c.version, qos: c.qos, topic: fmt.Sprintf("steady/v%d-qos%d", c.version, c.qos),
			burst: 8, size: 32, pause: 30 * time.Millisecond,
		})
	}
	// What stalled readers don't read: some 5 MB/s.
	s.sources = append(s.sources, &source{index: 6, version: 4, qos: 1, topic: "flood/1", burst: 30, size: 8 << 10, pause: 20 * time.Millisecond})
	var sinks []*sink
	for i, kind := range sinkKinds {
		k := &sink{
			soak: s, sinkKind: kind, index: uint64(i), ready: make(chan struct{}),
			received: make(map[uint16]bool), from: make([]progress, len(s.sources)),
		}
		for j := range k.from {
			k.from[j] = progress{next: 1, missing: make(map[uint64]bool)}
		}
		sinks = append(sinks, k)
	}
	return sinks
}

func (k *sink) run(ctx context.Context) {
	rng := rand.New(rand.NewPCG(k.seed, 50+k.index))
	for first := true; ctx.Err() == nil; first = false {
		p, present, err := connectPeer(k.server.address, k.version, k.name, k.clean)
		if first {
			if err == nil {
				err = p.subscribe(k.filter, 2)
			}
			close(k.ready)
		}
		if err != nil {
			k.fault("steady subscriber", "%s: %v", k.name, err)
			if k.leaves && !first {
				continue
			}
			return
		}
		if !first && !present {
			k.fault("session lost", "%s: CONNACK knows no session", k.name)
		}
		var until time.Time
		if k.leaves {
			until = time.Now().Add(between(rng, 100*time.Millisecond, 600*time.Millisecond))
		}
		err = k.listen(ctx, p, until)
		switch {
		case err != nil:
			k.fault("steady subscriber", "%s: disconnected: %v", k.name, err)
			p.Close()
			if !k.leaves {
				return
			}
		case rng.IntN(2) == 0: // without a word, and perhaps with unread messages
			p.reset()
		default:
			_, _ = p.Write([]byte{packets.Disconnect << 4, 0})
			p.Close()
		}
		if k.leaves {
			k.count("subscriber left")
			pauseFor(ctx, between(rng, 20*time.Millisecond, 300*time.Millisecond))
		}
	}
}

// listen takes messages until ctx is done or it is time to leave. Acknowledgements go out together when nothing is left to read.
func (k *sink) listen(ctx context.Context, p *peer, until time.Time) error {
	stop := context.AfterFunc(ctx, func() { _ = p.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	var acks []byte
	ping := time.Now()
	for ctx.Err() == nil && (until.IsZero() || time.Now().Before(until)) {
		if p.r.Buffered() == 0 {
			if time.Since(ping) > time.Second {
				ping = time.Now()
				acks = append(acks, pingreq...)
			}
			if _, err := p.Write(acks); err != nil {
				return err
			}
			acks = acks[:0]
			deadline := until
			if until.IsZero() {
				deadline = time.Now().Add(patience) // there is a PINGRESP at least
			}
			_ = p.SetReadDeadline(deadline)
			if ctx.Err() != nil {
				return nil
			}
		}
		f, err := p.read()
		switch {
		case ctx.Err() != nil || errors.Is(err, os.ErrDeadlineExceeded) && !until.IsZero():
			return nil // a packet may be lost half read: the connection ends with it
		case err != nil:
			return err
		}
		switch f.kind {
		case packets.Publish:
			if acks, err = k.take(f, acks); err != nil {
				return err
			}
		case packets.Pubrel:
			id, _, err := f.ack()
			if err != nil {
				return err
			}
			delete(k.received, id)
			acks = appendAck(acks, packets.Pubcomp, id)
		case packets.Pingresp:
		default:
			return fmt.Errorf("got %s %x", packets.PacketNames[f.kind], f.body)
		}
	}
	return nil
}

// take checks a message against what came before it.
func (k *sink) take(f frame, acks []byte) ([]byte, error) {
	topic, id, payload, err := f.publish(k.version)
	if err != nil || len(payload) < 9 || int(payload[0]) >= len(k.sources) {
		return acks, fmt.Errorf("PUBLISH %s with %d bytes: %w", topic, len(payload), err)
	}
	src, seq := k.sources[payload[0]], binary.BigEndian.Uint64(payload[1:])
	if f.qos() != src.qos || topic != src.topic {
		k.fault("delivery", "%s: message of %s at QoS %d came as %q at QoS %d", k.name, src.topic, src.qos, topic, f.qos())
	}
	if f.dup() && !k.leaves {
		k.fault("duplicate", "%s: %s %d has DUP though the client was never away", k.name, topic, seq)
	}
	switch f.qos() {
	case 1:
		acks = appendAck(acks, packets.Puback, id)
	case 2:
		acks = appendAck(acks, packets.Pubrec, id)
		if k.received[id] {
			if !f.dup() {
				k.fault("duplicate", "%s: %s %d is sent again without DUP", k.name, topic, seq)
			}
			return acks, nil
		}
		k.received[id] = true
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	from := &k.from[src.index]
	switch {
	case seq >= from.next:
		if seq-from.next > 1<<20 {
			return acks, fmt.Errorf("%s jumps from %d to %d", topic, from.next-1, seq)
		}
		for ; from.next < seq; from.next++ {
			if src.qos > 0 {
				from.missing[from.next] = true
			}
		}
		from.next++
		from.got++
	case from.missing[seq]:
		delete(from.missing, seq)
		from.got++
		k.fault("order", "%s: %s %d comes after %d", k.name, topic, seq, from.next-1)
	case src.qos == 0:
		k.fault("order", "%s: %s %d at QoS 0 comes after %d", k.name, topic, seq, from.next-1)
	case src.qos == 2:
		k.fault("duplicate", "%s: %s %d is delivered twice at QoS 2", k.name, topic, seq)
	case !f.dup():
		k.fault("duplicate", "%s: %s %d is delivered twice without DUP", k.name, topic, seq)
	}
	return acks, nil
}

// owed counts the acknowledged messages of QoS 1 and 2 that have not come.
func (k *sink) owed() (n int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, src := range k.sources {
		if src.qos > 0 && strings.HasPrefix(src.topic, strings.TrimSuffix(k.filter, "#")) {
			from := &k.from[src.index]
			n += len(from.missing) + int(max(src.sent.Load()+1, from.next)-from.next)
		}
	}
	return n
}

// awaitDeliveries returns when nothing is owed any more, or nothing has come of what is for a while.
func (s *soak) awaitDeliveries(sinks []*sink) {
	const quiet = 5 * time.Second
	for last, since := -1, time.Now(); time.Since(since) < quiet; time.Sleep(10 * time.Millisecond) {
		owed := 0
		for _, k := range sinks {
			owed += k.owed()
		}
		if owed == 0 {
			return
		}
		if owed != last {
			last, since = owed, time.Now()
		}
	}
}

// report says what never came.
func (k *sink) report() {
	var got uint64
	for _, from := range k.from {
		got += from.got
	}
	k.t.Logf("%s got %d messages", k.name, got)
	if got == 0 {
		k.fault("lost", "%s got nothing", k.name)
	}
	if k.owed() == 0 {
		return
	}
	for _, src := range k.sources {
		from := &k.from[src.index]
		if src.qos == 0 || !strings.HasPrefix(src.topic, strings.TrimSuffix(k.filter, "#")) {
			continue
		}
		if sent := src.sent.Load(); len(from.missing) > 0 || from.next <= sent {
			k.fault("lost", "%s: of %s 1 to %d, the last that came is %d, before it %d are missing", k.name, src.topic, sent, from.next-1, len(from.missing))
		}
	}
}

// queue is the disk: commits take a millisecond or two, one in a few hundred up to a second, and one in a hundred fails.
func (s *soak) queue() (*groupQueue, <-chan struct{}) {
	var mu sync.Mutex
	rng := rand.New(rand.NewPCG(s.seed, 1000))
	space := make(chan struct{}, 1)
	return &groupQueue{
		refuse: func() error {
			mu.Lock()
			defer mu.Unlock()
			if rng.IntN(1000) > 0 {
				return nil
			}
			s.count("append refused")
			time.AfterFunc(100*time.Millisecond, func() {
				select {
				case space <- struct{}{}:
				default:
				}
			})
			return fmt.Errorf("append: %w", bridge.ErrFull)
		},
		flush: func() (time.Duration, error) {
			mu.Lock()
			defer mu.Unlock()
			takes := between(rng, time.Millisecond, 2*time.Millisecond)
			if rng.IntN(400) == 0 {
				s.count("commit stalled")
				takes = between(rng, 100*time.Millisecond, time.Second)
			}
			if rng.IntN(100) == 0 {
				s.count("commit failed")
				return takes, errors.New("no space left on device")
			}
			return takes, nil
		},
	}, space
}

// keep notes what a commit that has ended well holds, until its vehicle has got the acknowledgement.
func (s *soak) keep(records []bridge.Record) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range records {
		var body struct{ Vin string }
		if err := json.Unmarshal(r.Body, &body); err != nil || body.Vin == "" {
			continue // not a vehicle's: the contested client doesn't ask
		}
		if s.stored[r.ClientID] == nil {
			s.stored[r.ClientID] = make(map[string]bool)
		}
		s.stored[r.ClientID][body.Vin] = true
	}
}

func (s *soak) isStored(client, vin string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stored[client][vin]
}

func (s *soak) forget(client string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.stored, client)
}

var vehicles = []struct{ version, qos byte }{{4, 1}, {4, 2}, {5, 1}, {5, 2}}

// telemetry is a publish that matches a rule, on its way to being acknowledged.
type telemetry struct {
	id       uint16
	vin      string
	payload  []byte
	sent     bool // once: from then on it goes with DUP
	received bool // PUBREC has come
	done     bool
}

// vehicle publishes what matches, in bursts. It checks that no acknowledgement comes before a commit of its message has ended well,
// on this connection or the next: when the server closes the connection because a commit failed, it comes back and sends again.
func (s *soak) vehicle(ctx context.Context, rng *rand.Rand, i int) {
	client, kind := fmt.Sprint("vehicle-", i), vehicles[i]
	v := &vehicle{soak: s, client: client, topic: "fleet/" + client + "/telemetry", version: kind.version, qos: kind.qos}
	defer v.leave()
	var id uint16
	for n := 0; ctx.Err() == nil; {
		burst := make([]*telemetry, 1+rng.IntN(20))
		for i := range burst {
			n++
			id = after(id)
			vin := fmt.Sprint(client, "/", n)
			burst[i] = &telemetry{id: id, vin: vin, payload: fmt.Appendf(nil, `{"vin":%q,"decel":6.75}`, vin)}
		}
		began := time.Now()
		for !v.deliver(burst) {
			if time.Since(began) > 2*patience {
				s.fault("vehicle", "%s: not acknowledged for %v", client, time.Since(began))
				return
			}
		}
		s.forget(client)
		pauseFor(ctx, between(rng, time.Millisecond, 20*time.Millisecond))
	}
}

type vehicle struct {
	*soak
	client, topic string
	version, qos  byte
	peer          *peer // nil: not connected
}

func (v *vehicle) leave() {
	if v.peer != nil {
		v.peer.Close()
		v.peer = nil
	}
}

// deliver sends what is not acknowledged yet and waits for the rest of it. False: the connection has ended before.
func (v *vehicle) deliver(burst []*telemetry) bool {
	if v.peer == nil {
		p, _, err := connectPeer(v.server.address, v.version, v.client, false)
		if err != nil {
			v.fault("vehicle", "%v", err)
			time.Sleep(100 * time.Millisecond)
			return false
		}
		v.peer = p
		v.count("vehicle connected")
	}
	var out []byte
	for _, m := range burst {
		switch {
		case m.done:
		case m.received:
			out = appendAck(out, packets.Pubrel, m.id)
		default:
			out = appendPublish(out, v.version, v.topic, v.qos, m.sent, m.id, m.payload)
			m.sent = true
		}
	}
	_, err := v.peer.Write(out)
	for err == nil && slices.ContainsFunc(burst, func(m *telemetry) bool { return !m.done }) {
		// The longest stall is a second. What is refused gets no answer but the end of the connection, some day.
		_ = v.peer.SetReadDeadline(time.Now().Add(3 * time.Second))
		var f frame
		if f, err = v.peer.read(); err == nil {
			err = v.answer(burst, f)
		}
	}
	if err != nil {
		if errors.Is(err, os.ErrDeadlineExceeded) {
			v.count("vehicle waited in vain")
		}
		v.leave()
		return false
	}
	return true
}

var errGoodbye = errors.New("the server says DISCONNECT")

func (v *vehicle) answer(burst []*telemetry, f frame) error {
	switch f.kind {
	case packets.Puback, packets.Pubrec, packets.Pubcomp:
	case packets.Disconnect:
		return errGoodbye
	default:
		v.fault("vehicle", "%s got %s %x", v.client, packets.PacketNames[f.kind], f.body)
		return nil
	}
	id, code, err := f.ack()
	if err != nil {
		return err
	}
	i := slices.IndexFunc(burst, func(m *telemetry) bool { return m.id == id })
	if i < 0 {
		return nil // of the burst before, sent again by the resumed session
	}
	m := burst[i]
	if f.kind == packets.Pubcomp {
		m.done = true
		return nil
	}
	switch {
	case code == packets.ErrQuotaExceeded.Code: // refused: it is free to try again, as a new publish
		v.count("publish refused")
		time.Sleep(10 * time.Millisecond)
		_, err := v.peer.Write(appendPublish(nil, v.version, v.topic, v.qos, false, id, m.payload))
		return err
	case code >= 0x80:
		v.fault("acknowledgement", "%s: %s %#x for what is sent again after a reconnect", v.client, packets.PacketNames[f.kind], code)
	case !v.isStored(v.client, m.vin):
		v.fault("acknowledgement", "%s: %s for %s before its commit ended well", v.client, packets.PacketNames[f.kind], m.vin)
	}
	if f.kind == packets.Puback {
		m.done = true
		return nil
	}
	m.received = true
	_, err = v.peer.Write(appendAck(nil, packets.Pubrel, id))
	return err
}

const stormSize = 100

// storm connects a hundred clients at a time, and closes them abruptly at all stages of connecting.
func (s *soak) storm(ctx context.Context, rng *rand.Rand, _ int) {
	for ctx.Err() == nil {
		var burst sync.WaitGroup
		for i := range stormSize {
			stage, version := rng.IntN(4), byte(4+rng.IntN(2))
			burst.Go(func() {
				p, err := dialPeer(s.server.address, version)
				if err != nil {
					s.fault("storm", "%v", err)
					return
				}
				defer p.reset()
				id, clean := fmt.Sprint("storm-", i), i%4 > 0
				switch stage {
				case 0: // not a word
				case 1:
					_, _ = p.Write(appendConnect(nil, version, id, clean, 60))
				default:
					if _, err := p.connect(id, clean, 60); err != nil {
						s.fault("storm", "%s: %v", id, err)
						return
					}
					if stage == 3 {
						if err := p.subscribe("storm/"+id, 1); err != nil {
							s.fault("storm", "%s: %v", id, err)
						}
					}
				}
			})
		}
		burst.Wait()
		s.count("storm")
		pauseFor(ctx, between(rng, 300*time.Millisecond, 700*time.Millisecond))
	}
}

const contested = "contested"

// takeovers connects several clients with one id at the same time. All are let in, one after the other, and
// the last of them stays [MQTT-3.1.4-3].
func (s *soak) takeovers(ctx context.Context, rng *rand.Rand, _ int) {
	for ctx.Err() == nil {
		n := 2 + rng.IntN(3)
		var connecting, pinging sync.WaitGroup
		var connected, alive atomic.Int32
		connecting.Add(n)
		for range n {
			version, clean, publishes := byte(4+rng.IntN(2)), rng.IntN(2) == 0, rng.IntN(2) == 0
			pinging.Go(func() {
				p, _, err := connectPeer(s.server.address, version, contested, clean)
				if err != nil {
					s.count("takeover refused") // by the time limit on takeovers, if commits stall; or its turn was over before CONNACK
					connecting.Done()
					return
				}
				defer p.Close()
				connected.Add(1)
				if publishes { // its acknowledgement may still be held when the next one comes
					_, _ = p.Write(appendPublish(nil, version, "fleet/contested/telemetry", 1, false, 1, []byte(braking)))
				}
				connecting.Done()
				connecting.Wait()
				_, _ = p.Write(pingreq)
				_ = p.SetReadDeadline(time.Now().Add(patience))
				for {
					f, err := p.read()
					switch {
					case errors.Is(err, os.ErrDeadlineExceeded):
						s.fault("takeover", "a connection is neither served nor closed")
						return
					case err != nil:
						return
					case f.kind == packets.Pingresp:
						alive.Add(1)
						return
					}
				}
			})
		}
		pinging.Wait()
		s.count("takeover")
		if connected.Load() == int32(n) && alive.Load() > 1 {
			s.fault("takeover", "of %d connections with one client id %d are served", n, alive.Load())
		}
		pauseFor(ctx, between(rng, 10*time.Millisecond, 50*time.Millisecond))
	}
}

// stalledReader subscribes to much and reads nothing, until it is sent away.
func (s *soak) stalledReader(ctx context.Context, _ *rand.Rand, i int) {
	for ctx.Err() == nil {
		p, _, err := connectPeer(s.server.address, byte(4+i%2), fmt.Sprint("stalled-", i), true)
		if err != nil {
			s.fault("stalled reader", "%v", err)
			return
		}
		if err := p.subscribe("flood/#", byte(i%3)); err != nil {
			s.fault("stalled reader", "%v", err)
		}
		began := time.Now()
		for ctx.Err() == nil && pauseFor(ctx, 100*time.Millisecond) {
			if _, err := p.Write(pingreq); err != nil {
				s.count("stalled reader sent away")
				break
			}
			if time.Since(began) > time.Minute {
				s.fault("stalled reader", "it may stay for %v", time.Since(began))
				break
			}
		}
		p.Close()
	}
}

const mutants = 8

// malformed sends packets that are wrong in every way that can be thought of at random, and some that can't be.
func (s *soak) malformed(ctx context.Context, rng *rand.Rand, i int) {
	for ctx.Err() == nil {
		version := byte(4 + rng.IntN(2))
		p, err := dialPeer(s.server.address, version)
		if err != nil {
			s.fault("malformed", "%v", err)
			return
		}
		var out []byte
		if rng.IntN(5) > 0 {
			out = appendConnect(out, version, fmt.Sprint("mutant-", rng.IntN(mutants)), true, 60)
		}
		switch rng.IntN(10) {
		case 0: // garbage
			for range 1 + rng.IntN(200) {
				out = append(out, byte(rng.Uint32()))
			}
		case 1: // a header that announces more than it may
			out = append(out, byte(1+rng.IntN(15))<<4|byte(rng.IntN(16)), 0xff, 0xff, 0xff, byte(rng.Uint32()), byte(rng.Uint32()))
		case 2: // known to be fatal to mochi
			out = append(out, truncatedSubscribe...)
		default:
			for range 1 + rng.IntN(4) {
				out = mutate(rng, out, version)
			}
		}
		s.count("malformed")
		_, _ = p.Write(out)
		_ = p.SetReadDeadline(time.Now().Add(between(rng, time.Millisecond, 20*time.Millisecond)))
		for range 100 {
			if _, err := p.read(); err != nil {
				break
			}
		}
		if rng.IntN(2) == 0 {
			p.reset()
		} else {
			p.Close()
		}
		pauseFor(ctx, between(rng, 0, 10*time.Millisecond))
	}
}

// mutate appends a valid packet with something changed.
func mutate(rng *rand.Rand, to []byte, version byte) []byte {
	valid := validPackets(version)
	pk := slices.Clone(valid[rng.IntN(len(valid))])
	body := pk[2:] // all are shorter than 128 bytes
	switch rng.IntN(6) {
	case 0: // bits flipped anywhere, the header included
		for range 1 + rng.IntN(4) {
			pk[rng.IntN(len(pk))] ^= 1 << rng.IntN(8)
		}
	case 1: // bits flipped in the body
		for range 1 + rng.IntN(4) {
			if len(body) > 0 {
				body[rng.IntN(len(body))] ^= 1 << rng.IntN(8)
			}
		}
	case 2: // cut short, with a length that says so
		body = body[:rng.IntN(len(body)+1)]
		return appendFrame(to, pk[0], body)
	case 3: // cut short, the next packet follows
		pk = pk[:1+rng.IntN(len(pk))]
	case 4: // bytes put in
		at := rng.IntN(len(body) + 1)
		extra := make([]byte, 1+rng.IntN(8))
		for i := range extra {
			extra[i] = byte(rng.Uint32())
		}
		return appendFrame(to, pk[0], slices.Insert(slices.Clone(body), at, extra...))
	default: // another type's body
		other := valid[rng.IntN(len(valid))]
		return appendFrame(to, pk[0], other[2:])
	}
	return append(to, pk...)
}

// validPackets has one of each packet that a client may send, with what may be in it.
func validPackets(version byte) [][]byte {
	props := func(p ...byte) []byte {
		if version < 5 {
			return nil
		}
		return append([]byte{byte(len(p))}, p...)
	}
	user := append([]byte{0x26}, append(text("key"), text("value")...)...)
	id := []byte{0, 7}
	pks := [][]byte{
		appendFrame(nil, 0x10, []byte{0, 4, 'M', 'Q', 'T', 'T', version, 0xee, 0, 60}, props(append([]byte{0x21, 0, 20, 0x27, 0, 1, 0, 0}, user...)...),
			text("mutant-0"), props(0x18, 0, 0, 0, 1), text("chaos/will"), text("gone"), text("user"), text("secret")),
		appendFrame(nil, 0x30, text("chaos/0"), props(append([]byte{1, 1, 2, 0, 0, 0, 9}, user...)...), []byte("payload")),
		appendFrame(nil, 0x32, text("chaos/1"), id, props(append([]byte{3, 0, 1, 'j', 8, 0, 1, 'r', 9, 0, 1, 'c'}, user...)...), []byte("payload")),
		appendFrame(nil, 0x34, text("chaos/2"), id, props(user...), []byte("payload")),
		appendFrame(nil, 0x35, text("chaos/3"), []byte{0, 8}, props(), []byte("retained")),
		appendFrame(nil, 0x62, id),
		appendFrame(nil, 0x82, id, props(append([]byte{0x0b, 5}, user...)...), text("chaos/#"), []byte{1}, text("$share/g/chaos/+"), []byte{0}),
		appendFrame(nil, 0xa2, id, props(user...), text("chaos/#"), text("chaos/+/x")),
		appendFrame(nil, 0xc0),
	}
	for _, first := range []byte{0x40, 0x50, 0x62, 0x70} {
		pk := appendFrame(nil, first, id)
		if version == 5 {
			pk = appendFrame(nil, first, id, []byte{0}, props(append(append([]byte{0x1f}, text("why")...), user...)...))
		}
		pks = append(pks, pk)
	}
	if version == 5 {
		pks = append(pks,
			appendFrame(nil, 0xe0, []byte{4}, props(append([]byte{0x11, 0, 0, 0, 0}, user...)...)),
			appendFrame(nil, 0xf0, []byte{0x18}, props(append([]byte{0x15}, text("method")...)...)))
	} else {
		pks = append(pks, appendFrame(nil, 0xe0))
	}
	return pks
}

// slowWriter sends a byte at a time, and is served all the same.
func (s *soak) slowWriter(ctx context.Context, rng *rand.Rand, i int) {
	version := byte(4 + i%2)
	for ctx.Err() == nil {
		p, err := dialPeer(s.server.address, version)
		if err != nil {
			s.fault("slow writer", "%v", err)
			return
		}
		out := appendConnect(nil, version, fmt.Sprint("slow-", i), true, 60)
		out = appendSubscribe(out, version, "slow/#", 1)
		out = appendPublish(out, version, fmt.Sprint("slow/", i), 2, false, 1, []byte("patience"))
		out = append(out, pingreq...)
		for j := 0; j < len(out) && err == nil; j++ {
			_, err = p.Write(out[j : j+1])
			time.Sleep(between(rng, 100*time.Microsecond, 3*time.Millisecond))
		}
		want := map[byte]int{packets.Connack: 1, packets.Suback: 1, packets.Pubrec: 1, packets.Pingresp: 1}
		_ = p.SetReadDeadline(time.Now().Add(patience))
		for err == nil && len(want) > 0 {
			var f frame
			f, err = p.read() // its own message and the other one's come between
			delete(want, f.kind)
		}
		if err != nil {
			s.fault("slow writer", "%v; still to come: %v", err, want)
		}
		s.count("slow writer served")
		p.Close()
	}
}

// vanishing goes in the middle of a packet; now and then it is silent for a while before.
func (s *soak) vanishing(ctx context.Context, rng *rand.Rand, _ int) {
	for ctx.Err() == nil {
		version := byte(4 + rng.IntN(2))
		p, err := dialPeer(s.server.address, version)
		if err != nil {
			s.fault("vanishing", "%v", err)
			return
		}
		out := appendConnect(nil, version, fmt.Sprint("vanishing-", rng.IntN(4)), true, 60)
		out = appendSubscribe(out, version, "vanishing/#", 1)
		out = appendPublish(out, version, "vanishing/1", byte(1+rng.IntN(2)), false, 1, make([]byte, 1000))
		_, _ = p.Write(out[:1+rng.IntN(len(out)-1)])
		pauseFor(ctx, between(rng, 0, 30*time.Millisecond))
		if tcp, ok := p.Conn.(*net.TCPConn); ok && rng.IntN(3) == 0 {
			_ = tcp.CloseWrite()
			pauseFor(ctx, 10*time.Millisecond)
		}
		if rng.IntN(2) == 0 {
			p.reset()
		} else {
			p.Close()
		}
		s.count("vanished")
	}
}
