package skywalking_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"runtime/pprof"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/apache/skywalking-go/plugins/core/reporter"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	commonv3 "skywalking.apache.org/repo/goapi/collect/common/v3"
	agentv3 "skywalking.apache.org/repo/goapi/collect/language/agent/v3"

	"github.com/throughline-mqtt/throughline/tracectx"
	"github.com/throughline-mqtt/throughline/tracectx/skywalking"
	"github.com/throughline-mqtt/throughline/tracectx/tracectxtest"
)

// patience bounds every wait of these tests; none is meant to come near it.
const patience = 20 * time.Second

func collector(t testing.TB, addr string, options ...grpc.ServerOption) *tracectxtest.Collector {
	t.Helper()
	c, err := tracectxtest.ListenCollector(addr, options...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Stop)
	return c
}

func newReporter(t testing.TB, o skywalking.ReporterOptions) *skywalking.Reporter {
	t.Helper()
	r, err := skywalking.NewReporter(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Close)
	return r
}

// closedPort is an address where nothing listens.
func closedPort(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func within(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

func waitFor(t *testing.T, c *tracectxtest.Collector, segments int) []*tracectxtest.Segment {
	t.Helper()
	err := c.Wait(within(t), func(s []*tracectxtest.Segment) bool { return len(s) >= segments })
	if err != nil {
		t.Fatal(err)
	}
	return c.Segments()
}

// eventually waits for what no channel announces.
func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not so after %v: %s", patience, what)
		}
	}
}

func flush(t *testing.T, r *skywalking.Reporter) {
	t.Helper()
	if err := r.Flush(within(t)); err != nil {
		t.Fatal(err)
	}
}

func one(tracer tracectx.Tracer) {
	tracer.StartEntry(tracectx.SpanOptions{Operation: "e"}).End()
}

// check compares the accounts; whatever they are, they must balance.
func check(t *testing.T, got skywalking.Stats, sent uint64, dropped map[skywalking.DropReason]uint64, queued int) {
	t.Helper()
	sum := got.Sent + uint64(got.Queued)
	for why, n := range got.Dropped {
		sum += n
		if n != dropped[why] {
			t.Errorf("%d dropped as %s, want %d", n, why, dropped[why])
		}
	}
	if got.Offered != sum {
		t.Errorf("%d offered, but %d accounted for: %+v", got.Offered, sum, got)
	}
	if got.Sent != sent || got.Queued != queued || (got.Queued == 0) != (got.QueuedBytes == 0) {
		t.Errorf("%+v, want %d sent and %d queued", got, sent, queued)
	}
}

func TestNewReporterRefuses(t *testing.T) {
	for name, o := range map[string]skywalking.ReporterOptions{
		"no address":         {},
		"no port":            {Address: "127.0.0.1"},
		"two addresses":      {Address: "a:1,b:2"},
		"negative segments":  {Address: "a:1", MaxSegments: -1},
		"negative bytes":     {Address: "a:1", MaxBytes: -1},
		"negative heartbeat": {Address: "a:1", Heartbeat: -1},
	} {
		if r, err := skywalking.NewReporter(o); err == nil {
			r.Close()
			t.Errorf("%s: taken", name)
		}
	}
}

// The whole chain through the wire, and its references in the protocol's terms.
func TestReportsOneTrace(t *testing.T) {
	c := collector(t, "127.0.0.1:0")
	tracer := func(service string) tracectx.Tracer {
		return newTracer(t, skywalking.Options{
			Service: service, Instance: service + "@1", Sample: 1,
			Reporter: newReporter(t, skywalking.ReporterOptions{Address: c.Addr()}),
		})
	}
	// The Recorder is the reference for what the tracer reports.
	recorders := make(map[string]*tracectxtest.Recorder)
	scenario := func(tracer func(service string) tracectx.Tracer) {
		broker := tracer("mqtt-broker")
		loop := tracer("vehicle-7").StartLocal(tracectx.SpanOptions{Operation: "loop"})
		publish := loop.StartExit(tracectx.SpanOptions{Operation: "publish", Peer: "127.0.0.1:1883", Layer: tracectx.LayerMQ})
		publish.End()
		loop.End()
		entry := broker.StartEntry(tracectx.SpanOptions{Operation: "mqtt/publish/a/+", Parent: publish.Context()})
		entry.Tag("mq.topic", "a/b")
		entry.StartLocal(tracectx.SpanOptions{Operation: "rule/r"}).End()
		entry.End()
		attempt := broker.StartLocal(tracectx.SpanOptions{Operation: "deliver", Parent: entry.Context()})
		exit := attempt.StartExit(tracectx.SpanOptions{Operation: "/notify", Peer: "127.0.0.1:8080", Layer: tracectx.LayerHTTP, Component: 5005})
		exit.Error("status 503")
		exit.End()
		attempt.End()
		wire, err := tracectx.Decode(exit.Context().Carrier())
		if err != nil {
			t.Fatal(err)
		}
		tracer("center").StartEntry(tracectx.SpanOptions{Operation: "POST:/notify", Parent: wire, Layer: tracectx.LayerHTTP}).End()
	}
	scenario(tracer)
	scenario(func(service string) tracectx.Tracer {
		recorders[service] = tracectxtest.NewRecorder(service)
		return recorders[service]
	})

	segments := waitFor(t, c, 4)
	if broken := tracectxtest.Broken(segments); len(broken) > 0 {
		t.Errorf("broken: %s", strings.Join(broken, "\n"))
	}
	var recorded []*tracectxtest.Segment
	for _, r := range recorders {
		recorded = append(recorded, r.Segments()...)
	}
	if got, want := shape(segments), shape(recorded); got != want {
		t.Errorf("reported:\n%s\nrecorded:\n%s", got, want)
	}
}

// shape prints traces without what differs from run to run.
func shape(segments []*tracectxtest.Segment) string {
	var b strings.Builder
	var visit func(n *tracectxtest.Node, depth int)
	visit = func(n *tracectxtest.Node, depth int) {
		sp := n.Span
		fmt.Fprintf(&b, "%*s%s %d %d %s %s %s %d %d %v %v", depth, "", n.Segment.Service,
			sp.ID, sp.Parent, sp.Kind, sp.Operation, sp.Peer, sp.Layer, sp.Component, sp.Failed, sp.Tags)
		for _, l := range sp.Logs {
			fmt.Fprintf(&b, " %v", l.Data)
		}
		for _, ref := range sp.Refs {
			fmt.Fprintf(&b, " <- %s %d %s %s %s", ref.Kind, ref.SpanID, ref.Service, ref.Endpoint, ref.Peer)
		}
		b.WriteByte('\n')
		for _, child := range n.Children {
			visit(child, depth+1)
		}
	}
	for _, tree := range tracectxtest.Trees(segments) {
		for _, root := range tree.Roots {
			visit(root, 0)
		}
	}
	return b.String()
}

func TestUnsampledIsNotReported(t *testing.T) {
	c := collector(t, "127.0.0.1:0")
	r := newReporter(t, skywalking.ReporterOptions{Address: c.Addr()})
	tracer := newTracer(t, skywalking.Options{Sample: 0, Reporter: r})
	one(tracer)
	tracer.StartEntry(tracectx.SpanOptions{Operation: "upstream says 1", Parent: vehicle}).End()
	flush(t, r)
	if s := c.Segments(); len(s) != 1 || s[0].TraceID != vehicle.TraceID {
		t.Errorf("%d segments came", len(s))
	}
	check(t, r.Stats(), 1, nil, 0)
}

func TestCollectorComesLate(t *testing.T) {
	addr := closedPort(t)
	var log lines
	r := newReporter(t, skywalking.ReporterOptions{Address: addr, Logger: slog.New(slog.NewTextHandler(&log, nil))})
	tracer := newTracer(t, skywalking.Options{Sample: 1, Reporter: r})
	for range 100 {
		one(tracer)
	}
	eventually(t, "disconnect is seen", func() bool { return r.ConnectionStatus() == reporter.ConnectionStatusDisconnect })
	eventually(t, "disconnect is logged", func() bool { return log.count("report trace segments") > 0 })
	check(t, r.Stats(), 0, nil, 100)

	c := collector(t, addr)
	waitFor(t, c, 100)
	flush(t, r)
	check(t, r.Stats(), 100, nil, 0)
	if r.ConnectionStatus() != reporter.ConnectionStatusConnected {
		t.Error("not connected")
	}
	eventually(t, "the end of the outage is logged", func() bool { return log.count("works again") == 2 })
	if n := log.count(`msg="report trace segments"`); n > 3 {
		t.Errorf("%d lines for one outage", n)
	}
}

func TestCollectorRestarts(t *testing.T) {
	first := collector(t, "127.0.0.1:0")
	r := newReporter(t, skywalking.ReporterOptions{Address: first.Addr(), Heartbeat: 10 * time.Millisecond})
	tracer := newTracer(t, skywalking.Options{Sample: 1, Reporter: r})

	const each = 200
	publish := func() {
		for range each {
			one(tracer)
		}
	}
	publish()
	waitFor(t, first, 1) // it stops while it is being told
	first.Stop()
	publish()
	second := collector(t, first.Addr())
	publish()
	flush(t, r)

	check(t, r.Stats(), 3*each, nil, 0)
	got := make(map[string]bool)
	for _, s := range append(first.Segments(), second.Segments()...) {
		got[s.ID] = true
	}
	if len(got) != 3*each {
		t.Errorf("%d segments came, want %d", len(got), 3*each)
	}
	eventually(t, "the new collector knows the instance", func() bool {
		in := second.Instances()
		return len(in) == 1 && in[0].Properties["language"] == "go" && in[0].Heartbeats > 1
	})
}

// faulty makes the end of the first streams fail, after they were read.
type faulty struct {
	fails atomic.Int32
	code  codes.Code
	when  func(*agentv3.SegmentObject) bool // nil: always
}

func (f *faulty) intercept(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	if !strings.Contains(info.FullMethod, "TraceSegment") {
		return handler(srv, ss)
	}
	w := &watched{ServerStream: ss, when: f.when, hit: f.when == nil}
	w.fail = func() error {
		if w.hit && f.fails.Add(-1) >= 0 {
			return status.Error(f.code, "no luck")
		}
		return nil
	}
	return handler(srv, w)
}

type watched struct {
	grpc.ServerStream
	when func(*agentv3.SegmentObject) bool
	hit  bool
	fail func() error
}

func (w *watched) RecvMsg(m any) error {
	err := w.ServerStream.RecvMsg(m)
	if o, ok := m.(*agentv3.SegmentObject); ok && err == nil && w.when != nil && w.when(o) {
		w.hit = true
	}
	return err
}

func (w *watched) SendMsg(m any) error {
	if err := w.fail(); err != nil {
		return err
	}
	return w.ServerStream.SendMsg(m)
}

func TestUnconfirmedSegmentsAreSentAgain(t *testing.T) {
	for _, code := range []codes.Code{codes.Unavailable, codes.Internal, codes.Unknown, codes.ResourceExhausted, codes.PermissionDenied} {
		t.Run(code.String(), func(t *testing.T) {
			f := &faulty{code: code}
			f.fails.Store(2)
			c := collector(t, "127.0.0.1:0", grpc.StreamInterceptor(f.intercept))
			r := newReporter(t, skywalking.ReporterOptions{Address: c.Addr()})
			one(newTracer(t, skywalking.Options{Sample: 1, Reporter: r}))
			flush(t, r)
			check(t, r.Stats(), 1, nil, 0)
			if c.Received() != 3 || len(c.Segments()) != 1 {
				t.Errorf("received %d, of them different %d; want 3 and 1", c.Received(), len(c.Segments()))
			}
		})
	}
}

func TestRejectedSegmentDoesNotStopTheOthers(t *testing.T) {
	f := &faulty{code: codes.InvalidArgument, when: func(o *agentv3.SegmentObject) bool { return o.Spans[0].OperationName == "bad" }}
	f.fails.Store(1000)
	c := collector(t, "127.0.0.1:0", grpc.StreamInterceptor(f.intercept))
	r := newReporter(t, skywalking.ReporterOptions{Address: c.Addr()})
	tracer := newTracer(t, skywalking.Options{Sample: 1, Reporter: r})
	for i := range 300 {
		op := "good"
		if i%100 == 50 {
			op = "bad"
		}
		tracer.StartEntry(tracectx.SpanOptions{Operation: op}).End()
	}
	flush(t, r)
	check(t, r.Stats(), 297, map[skywalking.DropReason]uint64{skywalking.DropRejected: 3}, 0)
}

// hasty is a collector that, once armed, ends a stream with success before it has
// read it. Before that it refuses, afterwards it reads.
type hasty struct {
	agentv3.UnimplementedTraceSegmentReportServiceServer
	armed   atomic.Bool
	hasted  atomic.Bool
	refused atomic.Int32
	read    atomic.Int32
}

func (h *hasty) Collect(s agentv3.TraceSegmentReportService_CollectServer) error {
	if !h.armed.Load() {
		h.refused.Add(1)
		return status.Error(codes.Unavailable, "not yet")
	}
	if h.hasted.CompareAndSwap(false, true) {
		return s.SendAndClose(&commonv3.Commands{})
	}
	for {
		if _, err := s.Recv(); err != nil {
			return s.SendAndClose(&commonv3.Commands{})
		}
		h.read.Add(1)
	}
}

func TestStreamEndedEarlyConfirmsNothing(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(grpc.StaticStreamWindowSize(64 << 10))
	h := new(hasty)
	agentv3.RegisterTraceSegmentReportServiceServer(server, h)
	go server.Serve(l)
	t.Cleanup(server.Stop)

	r := newReporter(t, skywalking.ReporterOptions{Address: l.Addr().String()})
	tracer := newTracer(t, skywalking.Options{Sample: 1, Reporter: r})
	// More than the window lets through: when the stream ends, not all can have been sent.
	const segments = 20
	for range segments {
		span := tracer.StartEntry(tracectx.SpanOptions{Operation: "large"})
		span.Tag("text", strings.Repeat("x", 40<<10))
		span.End()
	}
	// The second stream from now on is begun with all of them.
	so := h.refused.Load()
	eventually(t, "two more streams are refused", func() bool { return h.refused.Load() >= so+2 })
	h.armed.Store(true)
	flush(t, r)
	if got := h.read.Load(); got < segments {
		t.Errorf("%d segments read, want at least %d", got, segments)
	}
	check(t, r.Stats(), segments, nil, 0)
}

func TestQueueIsBounded(t *testing.T) {
	for name, o := range map[string]skywalking.ReporterOptions{
		"in segments": {MaxSegments: 10},
		"in bytes":    {MaxBytes: 10 * segmentSize(t)},
	} {
		t.Run(name, func(t *testing.T) {
			o.Address = closedPort(t)
			o.CloseTimeout = time.Millisecond
			registry := prometheus.NewRegistry()
			o.Registerer = registry
			r := newReporter(t, o)
			tracer := newTracer(t, skywalking.Options{Sample: 1, Reporter: r})
			for range 25 {
				one(tracer)
			}
			check(t, r.Stats(), 0, map[skywalking.DropReason]uint64{skywalking.DropQueueFull: 15}, 10)

			r.Close()
			one(tracer)
			check(t, r.Stats(), 0, map[skywalking.DropReason]uint64{skywalking.DropQueueFull: 15, skywalking.DropClosed: 11}, 0)
			err := testutil.GatherAndCompare(registry, strings.NewReader(`
# HELP throughline_trace_segments_dropped_total Trace segments that were not reported, by reason.
# TYPE throughline_trace_segments_dropped_total counter
throughline_trace_segments_dropped_total{reason="closed"} 11
throughline_trace_segments_dropped_total{reason="invalid"} 0
throughline_trace_segments_dropped_total{reason="queue_full"} 15
throughline_trace_segments_dropped_total{reason="rejected"} 0
throughline_trace_segments_dropped_total{reason="too_large"} 0
throughline_trace_segments_dropped_total{reason="unsupported"} 0
# HELP throughline_trace_segments_offered_total Trace segments handed to the reporter.
# TYPE throughline_trace_segments_offered_total counter
throughline_trace_segments_offered_total 26
# HELP throughline_trace_queue_segments Trace segments that wait for the collector or its confirmation.
# TYPE throughline_trace_queue_segments gauge
throughline_trace_queue_segments 0
`), "throughline_trace_segments_dropped_total", "throughline_trace_segments_offered_total", "throughline_trace_queue_segments")
			if err != nil {
				t.Error(err)
			}
		})
	}
}

// segmentSize is the encoded size of what one reports.
func segmentSize(t *testing.T) int64 {
	r := newReporter(t, skywalking.ReporterOptions{Address: closedPort(t), CloseTimeout: time.Millisecond})
	one(newTracer(t, skywalking.Options{Sample: 1, Reporter: r}))
	return r.Stats().QueuedBytes
}

func TestWhatIsNotReportedIsCounted(t *testing.T) {
	r := newReporter(t, skywalking.ReporterOptions{Address: closedPort(t), CloseTimeout: time.Millisecond})
	var k kept
	one(newTracer(t, skywalking.Options{Sample: 1, Reporter: &k}))
	r.SendTracing(k.segments[0]) // before Boot
	tracer := newTracer(t, skywalking.Options{Sample: 1, Reporter: r})

	large := tracer.StartEntry(tracectx.SpanOptions{Operation: "large"})
	large.Tag("text", strings.Repeat("x", 1<<20))
	large.End()
	r.SendTracing([]reporter.ReportedSpan{badText{k.segments[0][0]}})
	r.SendTracing(nil)
	r.SendMetrics(nil)
	r.SendLog(nil)
	check(t, r.Stats(), 0, map[skywalking.DropReason]uint64{
		skywalking.DropClosed: 1, skywalking.DropTooLarge: 1, skywalking.DropInvalid: 1, skywalking.DropUnsupported: 2,
	}, 0)
}

// badText is a span of a tracer that does not look at what it is given.
type badText struct{ reporter.ReportedSpan }

func (badText) OperationName() string { return "\xff" }

func TestAccountsBalanceUnderLoad(t *testing.T) {
	f := &faulty{code: codes.Unavailable}
	f.fails.Store(3)
	c := collector(t, "127.0.0.1:0", grpc.StreamInterceptor(f.intercept))
	r := newReporter(t, skywalking.ReporterOptions{Address: c.Addr(), MaxSegments: 500})
	tracer := newTracer(t, skywalking.Options{Sample: 1, Reporter: r})
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 500 {
				one(tracer)
				s := r.Stats()
				if sum := s.Sent + s.Dropped[skywalking.DropQueueFull] + uint64(s.Queued); sum != s.Offered || s.Queued > 500 {
					t.Errorf("accounts do not balance: %+v", s)
					return
				}
			}
		})
	}
	wg.Wait()
	r.Close()
	s := r.Stats()
	if s.Offered != 4000 || s.Sent != uint64(len(c.Segments())) {
		t.Errorf("%+v, collector has %d", s, len(c.Segments()))
	}
	check(t, s, s.Sent, map[skywalking.DropReason]uint64{skywalking.DropQueueFull: 4000 - s.Sent}, 0)
}

func TestFlushIsBounded(t *testing.T) {
	r := newReporter(t, skywalking.ReporterOptions{Address: closedPort(t), CloseTimeout: time.Millisecond})
	one(newTracer(t, skywalking.Options{Sample: 1, Reporter: r}))
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	err := r.Flush(ctx)
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "1 not confirmed") {
		t.Errorf("flush: %v", err)
	}
}

func TestCloseFlushesAndLeavesNothingBehind(t *testing.T) {
	c := collector(t, "127.0.0.1:0")
	for name, addr := range map[string]string{"collector up": c.Addr(), "collector down": closedPort(t)} {
		t.Run(name, func(t *testing.T) {
			r, err := skywalking.NewReporter(skywalking.ReporterOptions{Address: addr, CloseTimeout: 200 * time.Millisecond})
			if err != nil {
				t.Fatal(err)
			}
			tracer := newTracer(t, skywalking.Options{Sample: 1, Reporter: r})
			for range 50 {
				one(tracer)
			}
			r.Close()
			r.Close()
			s := r.Stats()
			if s.Queued != 0 || s.Sent+s.Dropped[skywalking.DropClosed] != 50 {
				t.Errorf("%+v", s)
			}
			if name == "collector up" && s.Sent != 50 {
				t.Errorf("%d sent", s.Sent)
			}
			if r.ConnectionStatus() != reporter.ConnectionStatusShutdown {
				t.Error("not shut down")
			}
			one(tracer)
			eventually(t, "no goroutine of the reporter or its connection is left", func() bool {
				var b bytes.Buffer
				pprof.Lookup("goroutine").WriteTo(&b, 1)
				return !strings.Contains(b.String(), "skywalking.(*Reporter)") &&
					!strings.Contains(b.String(), "http2Client")
			})
		})
	}
}

func TestCloseWithoutBoot(t *testing.T) {
	r, err := skywalking.NewReporter(skywalking.ReporterOptions{Address: closedPort(t)})
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
}

func TestTokenAndTLS(t *testing.T) {
	cert, roots := certificate(t)
	var tokens sync.Map
	note := func(ctx context.Context, method string) error {
		md, _ := metadata.FromIncomingContext(ctx)
		if got := md.Get("Authentication"); len(got) != 1 || got[0] != "secret" {
			return status.Error(codes.PermissionDenied, "who are you")
		}
		tokens.Store(method, true)
		return nil
	}
	c := collector(t, "127.0.0.1:0",
		grpc.Creds(credentials.NewServerTLSFromCert(&cert)),
		grpc.StreamInterceptor(func(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
			if err := note(ss.Context(), info.FullMethod); err != nil {
				return err
			}
			return handler(srv, ss)
		}),
		grpc.UnaryInterceptor(func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
			if err := note(ctx, info.FullMethod); err != nil {
				return nil, err
			}
			return handler(ctx, req)
		}))
	r := newReporter(t, skywalking.ReporterOptions{Address: c.Addr(), Token: "secret", TLS: &tls.Config{RootCAs: roots}})
	one(newTracer(t, skywalking.Options{Sample: 1, Reporter: r}))
	flush(t, r)
	check(t, r.Stats(), 1, nil, 0)
	eventually(t, "heartbeats come with the token", func() bool {
		_, ok := tokens.Load("/skywalking.v3.ManagementService/keepAlive")
		return ok
	})
}

func certificate(t *testing.T) (tls.Certificate, *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		IPAddresses:  []net.IP{net.IPv4(127, 0, 0, 1)},
		NotAfter:     time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(leaf)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, roots
}

// lines is a log that can be read while it is written.
type lines struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *lines) count(part string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.text.String(), part)
}

func BenchmarkReport(b *testing.B) {
	c := collector(b, "127.0.0.1:0")
	r := newReporter(b, skywalking.ReporterOptions{Address: c.Addr(), MaxSegments: 1 << 30, MaxBytes: 1 << 40})
	tracer := newTracer(b, skywalking.Options{Sample: 1, Reporter: r})
	b.ReportAllocs()
	for b.Loop() {
		publishAndAttempt(tracer, vehicle)
	}
	if err := r.Flush(within(b)); err != nil { // part of the price
		b.Fatal(err)
	}
}

// What a publish pays when the collector is away and the queue is full.
func BenchmarkReportCollectorDown(b *testing.B) {
	r := newReporter(b, skywalking.ReporterOptions{Address: closedPort(b), MaxSegments: 1000, CloseTimeout: time.Millisecond})
	tracer := newTracer(b, skywalking.Options{Sample: 1, Reporter: r})
	b.ReportAllocs()
	for b.Loop() {
		publishAndAttempt(tracer, vehicle)
	}
}
