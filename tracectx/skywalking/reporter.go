package skywalking

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/apache/skywalking-go/plugins/core/reporter"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	agentv3 "skywalking.apache.org/repo/goapi/collect/language/agent/v3"
	logv3 "skywalking.apache.org/repo/goapi/collect/logging/v3"
	managementv3 "skywalking.apache.org/repo/goapi/collect/management/v3"
)

const (
	defaultMaxSegments  = 30_000 // as skywalking-go's own reporter
	defaultMaxBytes     = 64 << 20
	defaultHeartbeat    = 20 * time.Second // as skywalking-go's own reporter
	defaultCloseTimeout = 5 * time.Second

	// maxSegment is far above what a sound segment has and well below the 4 MiB that
	// gRPC servers accept by default, so that one segment never blocks the queue.
	maxSegment = 1 << 20

	// A stream carries at most a batch. Its end is the only confirmation that there
	// is, so a batch is also what is sent again when the confirmation fails to come.
	batchSegments = 1000
	batchBytes    = 1 << 20

	// confirmTimeout is as long as SkyWalking's Java agent waits for a stream's end.
	confirmTimeout = 30 * time.Second

	// After a failure the next attempt comes soon, then less often, but never so
	// seldom that a collector which is back waits long for what is queued.
	minRetry = 100 * time.Millisecond
	maxRetry = time.Second

	// propertiesEvery is the number of heartbeats after which the instance
	// properties are told again, as SkyWalking's Java agent does.
	propertiesEvery = 10
)

// ReporterOptions configure a Reporter. Zero values mean the defaults.
type ReporterOptions struct {
	Address string      // host:port of the collector's gRPC service; required
	Token   string      // sent as "authentication" metadata; "": none. Without TLS it goes in clear.
	TLS     *tls.Config // nil: plain text

	// MaxSegments (30,000) and MaxBytes (64 MiB, encoded) bound what waits for the
	// collector. When either is reached, new segments are dropped.
	MaxSegments int
	MaxBytes    int64

	Heartbeat    time.Duration // between signs of life to the collector; 20 s
	CloseTimeout time.Duration // how long Close may go on sending; 5 s

	Logger     *slog.Logger          // nil: no logs
	Registerer prometheus.Registerer // nil: no metrics
}

// Reporter reports segments over SkyWalking's native gRPC protocol. It implements
// skywalking-go's reporter.Reporter and is safe for concurrent use.
//
// The protocol has no acknowledgement per segment: a collector confirms a stream when
// the stream ends. So each stream carries one batch, is closed, and only when its end
// is confirmed do the batch's segments count as sent; otherwise they are sent again.
// When a confirmation is lost, the collector gets segments twice. SkyWalking stores a
// segment under its id, so a trace is not doubled by that, but its metrics count the
// calls twice: better than a hole in the trace.
//
// Segments are all that is reported: a meter or a log that is handed to it is counted
// as dropped. Dynamic configuration from the collector is not taken either.
type Reporter struct {
	conn       *grpc.ClientConn
	segments   agentv3.TraceSegmentReportServiceClient
	management managementv3.ManagementServiceClient
	queue      *queue
	heartbeat  time.Duration
	closeWait  time.Duration
	log        *slog.Logger

	entity  atomic.Pointer[reporter.Entity] // nil until Boot
	ctx     context.Context                 // ends the loops; carries the token
	stop    context.CancelFunc
	loops   sync.WaitGroup
	closing sync.Once
}

var _ reporter.Reporter = (*Reporter)(nil)

// NewReporter returns a Reporter that connects when it is booted. A collector that is
// not there is no error: segments wait for it.
func NewReporter(o ReporterOptions) (*Reporter, error) {
	if _, _, err := net.SplitHostPort(o.Address); err != nil {
		return nil, fmt.Errorf("skywalking reporter: collector address %q is not host:port", o.Address)
	}
	if o.MaxSegments < 0 || o.MaxBytes < 0 || o.Heartbeat < 0 || o.CloseTimeout < 0 {
		return nil, errors.New("skywalking reporter: a limit is negative")
	}
	transport := insecure.NewCredentials()
	if o.TLS != nil {
		transport = credentials.NewTLS(o.TLS)
	}
	conn, err := grpc.NewClient(o.Address,
		grpc.WithTransportCredentials(transport),
		grpc.WithDefaultCallOptions(grpc.ForceCodecV2(codec{encoding.GetCodecV2("proto")})),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: minRetry, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 2 * time.Second},
			MinConnectTimeout: 5 * time.Second,
		}),
		// Pings as rare as servers tolerate by default. It is Timeout that matters: it
		// becomes TCP_USER_TIMEOUT, so that a collector whose host has vanished is
		// noticed when data stays unacknowledged, not when TCP gives up after minutes.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 5 * time.Minute, Timeout: 10 * time.Second}),
	)
	if err != nil {
		return nil, fmt.Errorf("skywalking reporter: collector %s: %w", o.Address, err)
	}
	ctx, stop := context.WithCancel(context.Background())
	if o.Token != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "authentication", o.Token)
	}
	r := &Reporter{
		conn:       conn,
		segments:   agentv3.NewTraceSegmentReportServiceClient(conn),
		management: managementv3.NewManagementServiceClient(conn),
		queue:      newQueue(cmp.Or(o.MaxSegments, defaultMaxSegments), cmp.Or(o.MaxBytes, defaultMaxBytes)),
		heartbeat:  cmp.Or(o.Heartbeat, defaultHeartbeat),
		closeWait:  cmp.Or(o.CloseTimeout, defaultCloseTimeout),
		log:        cmp.Or(o.Logger, slog.New(slog.DiscardHandler)).With("collector", o.Address),
		ctx:        ctx,
		stop:       stop,
	}
	if o.Registerer != nil {
		if err := r.register(o.Registerer); err != nil {
			stop()
			return nil, errors.Join(fmt.Errorf("skywalking reporter: %w", err), conn.Close())
		}
	}
	return r, nil
}

func (r *Reporter) register(to prometheus.Registerer) error {
	counter := func(name, help string, labels prometheus.Labels, value func(Stats) uint64) prometheus.Collector {
		return prometheus.NewCounterFunc(
			prometheus.CounterOpts{Name: name, Help: help, ConstLabels: labels},
			func() float64 { return float64(value(r.queue.stats())) })
	}
	gauge := func(name, help string, value func(Stats) float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(
			prometheus.GaugeOpts{Name: name, Help: help},
			func() float64 { return value(r.queue.stats()) })
	}
	collectors := []prometheus.Collector{
		counter("throughline_trace_segments_offered_total", "Trace segments handed to the reporter.", nil,
			func(s Stats) uint64 { return s.Offered }),
		counter("throughline_trace_segments_sent_total", "Trace segments that the collector confirmed.", nil,
			func(s Stats) uint64 { return s.Sent }),
		gauge("throughline_trace_queue_segments", "Trace segments that wait for the collector or its confirmation.",
			func(s Stats) float64 { return float64(s.Queued) }),
		gauge("throughline_trace_queue_bytes", "Encoded size of the trace segments that wait.",
			func(s Stats) float64 { return float64(s.QueuedBytes) }),
	}
	for _, why := range DropReasons() {
		collectors = append(collectors, counter("throughline_trace_segments_dropped_total",
			"Trace segments that were not reported, by reason.", prometheus.Labels{"reason": string(why)},
			func(s Stats) uint64 { return s.Dropped[why] }))
	}
	for _, c := range collectors {
		if err := to.Register(c); err != nil {
			return err
		}
	}
	return nil
}

// Boot introduces the entity to the collector and begins to report. NewTracer calls
// it; a second call changes nothing. The watchers are for dynamic configuration and
// are not told anything.
func (r *Reporter) Boot(entity *reporter.Entity, _ []reporter.AgentConfigChangeWatcher) {
	if !r.entity.CompareAndSwap(nil, entity) {
		return
	}
	r.loops.Go(r.sendQueue)
	r.loops.Go(r.keepAlive)
}

// SendTracing queues a segment, its first span last, as tracers of skywalking-go hand
// it over. It never blocks: a segment that finds no room is counted as dropped. The
// spans are not retained.
func (r *Reporter) SendTracing(spans []reporter.ReportedSpan) {
	if len(spans) == 0 {
		return
	}
	entity := r.entity.Load()
	if entity == nil {
		r.queue.refuse(DropClosed)
		return
	}
	if r.queue.turnAway() {
		return
	}
	f, err := proto.Marshal(segmentObject(entity, spans))
	switch {
	case err != nil:
		r.queue.refuse(DropInvalid)
	case len(f) > maxSegment:
		r.queue.refuse(DropTooLarge)
	default:
		r.queue.put(f)
	}
}

// SendMetrics counts the meters as one that was dropped as unsupported.
func (r *Reporter) SendMetrics([]reporter.ReportedMeter) { r.queue.refuse(DropUnsupported) }

// SendLog counts the log as dropped as unsupported.
func (r *Reporter) SendLog(*logv3.LogData) { r.queue.refuse(DropUnsupported) }

// ConnectionStatus says whether the collector can be reached, as far as is known.
func (r *Reporter) ConnectionStatus() reporter.ConnectionStatus {
	switch r.conn.GetState() {
	case connectivity.Ready, connectivity.Idle:
		return reporter.ConnectionStatusConnected
	case connectivity.Shutdown:
		return reporter.ConnectionStatusShutdown
	default:
		return reporter.ConnectionStatusDisconnect
	}
}

// Stats returns the accounts.
func (r *Reporter) Stats() Stats { return r.queue.stats() }

// Flush blocks until every segment that is queued now has been confirmed or dropped,
// or until ctx ends; then the error says how many are left, and wraps ctx's.
func (r *Reporter) Flush(ctx context.Context) error {
	if left := r.queue.wait(ctx); left > 0 {
		return fmt.Errorf("flush trace segments: %d not confirmed: %w", left, ctx.Err())
	}
	return nil
}

// Close refuses further segments, goes on sending the queued ones for at most
// CloseTimeout, counts the rest as dropped and disconnects. It blocks until that is
// done; further calls wait for the first.
func (r *Reporter) Close() {
	r.closing.Do(func() {
		r.queue.close()
		ctx, cancel := context.WithTimeout(r.ctx, r.closeWait)
		defer cancel()
		if err := r.Flush(ctx); err != nil {
			r.log.Warn("trace segments dropped on close", "error", err)
		}
		r.stop()
		r.loops.Wait()
		r.queue.drop(r.queue.stats().Queued, DropClosed)
		if err := r.conn.Close(); err != nil {
			r.log.Warn("close connection to collector", "error", err)
		}
	})
}

// sendQueue reports what is queued, batch by batch, until the reporter is closed.
func (r *Reporter) sendQueue() {
	trouble := outage{log: r.log, doing: "report trace segments"}
	limit := batchSegments
	retry := minRetry
	for {
		batch := r.queue.head(limit, batchBytes)
		if len(batch) == 0 {
			select {
			case <-r.queue.ready:
				continue
			case <-r.ctx.Done():
				return
			}
		}
		err := r.sendBatch(batch)
		if r.ctx.Err() != nil && err != nil {
			return
		}
		trouble.note(err)
		switch {
		case err == nil:
			r.queue.confirm(len(batch))
			limit = min(2*limit, batchSegments)
			retry = minRetry
			continue
		case !rejected(err):
		case len(batch) == 1:
			r.queue.drop(1, DropRejected)
			continue
		default: // one of them is at fault: smaller batches find it
			limit = len(batch) / 2
			continue
		}
		if status.Code(err) == codes.DeadlineExceeded { // perhaps too much for a slow collector
			limit = max(1, len(batch)/2)
		}
		if !r.sleep(retry) {
			return
		}
		retry = min(2*retry, maxRetry)
	}
}

// sendBatch sends one stream and waits for the collector to confirm its end.
func (r *Reporter) sendBatch(batch []frame) error {
	ctx, cancel := context.WithTimeout(r.ctx, confirmTimeout)
	defer cancel()
	stream, err := r.segments.Collect(ctx)
	if err != nil {
		return err
	}
	for _, f := range batch {
		if err := stream.SendMsg(f); errors.Is(err, io.EOF) { // ended by the collector, which says why below
			if _, err := stream.CloseAndRecv(); err != nil {
				return err
			}
			return errors.New("collector ended the stream before it had every segment")
		} else if err != nil {
			return err
		}
	}
	_, err = stream.CloseAndRecv()
	return err
}

// rejected reports whether the collector refused what it got, so that sending it
// again is of no use. All else, a wrong token too, can be put right on its side.
func rejected(err error) bool {
	switch status.Code(err) {
	case codes.InvalidArgument, codes.FailedPrecondition, codes.OutOfRange:
		return true
	default:
		return false
	}
}

// keepAlive tells the collector that this instance lives, and after any failure, and
// now and then, its properties: the collector may be another one by then.
func (r *Reporter) keepAlive() {
	trouble := outage{log: r.log, doing: "send heartbeat to collector"}
	for beat := 0; ; beat++ {
		err := r.beat(beat%propertiesEvery == 0)
		if r.ctx.Err() != nil {
			return
		}
		trouble.note(err)
		wait := r.heartbeat
		if err != nil {
			beat = -1
			wait = min(wait, maxRetry)
		}
		if !r.sleep(wait) {
			return
		}
	}
}

func (r *Reporter) beat(properties bool) error {
	ctx, cancel := context.WithTimeout(r.ctx, confirmTimeout)
	defer cancel()
	e := r.entity.Load()
	if properties {
		_, err := r.management.ReportInstanceProperties(ctx, &managementv3.InstanceProperties{
			Service: e.ServiceName, ServiceInstance: e.ServiceInstanceName, Properties: e.Props,
		})
		if err != nil {
			return err
		}
	}
	_, err := r.management.KeepAlive(ctx, &managementv3.InstancePingPkg{
		Service: e.ServiceName, ServiceInstance: e.ServiceInstanceName,
	})
	return err
}

// sleep reports whether the reporter is still open after d.
func (r *Reporter) sleep(d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-r.ctx.Done():
		return false
	}
}

// outage logs a failure when its text changes, and when it is over.
type outage struct {
	log   *slog.Logger
	doing string
	last  string
}

func (o *outage) note(err error) {
	switch {
	case err == nil && o.last != "":
		o.log.Info(o.doing + ": works again")
		o.last = ""
	case err != nil && err.Error() != o.last:
		o.log.Warn(o.doing, "error", err)
		o.last = err.Error()
	}
}

// codec sends frames as they are, and all else as gRPC does.
type codec struct{ encoding.CodecV2 }

func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	if f, ok := v.(frame); ok {
		return mem.BufferSlice{mem.SliceBuffer(f)}, nil
	}
	return c.CodecV2.Marshal(v)
}

// segmentObject converts a segment whose first span comes last.
func segmentObject(entity *reporter.Entity, spans []reporter.ReportedSpan) *agentv3.SegmentObject {
	root := spans[len(spans)-1].Context()
	o := &agentv3.SegmentObject{
		TraceId:         root.GetTraceID(),
		TraceSegmentId:  root.GetSegmentID(),
		Service:         entity.ServiceName,
		ServiceInstance: entity.ServiceInstanceName,
		Spans:           make([]*agentv3.SpanObject, len(spans)),
	}
	objects := make([]agentv3.SpanObject, len(spans))
	for i, s := range spans {
		c := s.Context()
		so := &objects[i]
		so.SpanId = c.GetSpanID()
		so.ParentSpanId = c.GetParentSpanID()
		so.StartTime = s.StartTime()
		so.EndTime = s.EndTime()
		so.OperationName = s.OperationName()
		so.Peer = s.Peer()
		so.SpanType = s.SpanType()
		so.SpanLayer = s.SpanLayer()
		so.ComponentId = s.ComponentID()
		so.IsError = s.IsError()
		so.Tags = s.Tags()
		so.Logs = s.Logs()
		for _, ref := range s.Refs() {
			so.Refs = append(so.Refs, segmentReference(s.SpanType(), ref))
		}
		o.Spans[i] = so
	}
	return o
}

// segmentReference converts a reference. A LocalSpan continues work of its own
// service; were it CrossProcess, OAP would draw a call from the service to itself.
func segmentReference(from agentv3.SpanType, to reporter.SpanContext) *agentv3.SegmentReference {
	kind := agentv3.RefType_CrossProcess
	if from == agentv3.SpanType_Local {
		kind = agentv3.RefType_CrossThread
	}
	return &agentv3.SegmentReference{
		RefType:                  kind,
		TraceId:                  to.GetTraceID(),
		ParentTraceSegmentId:     to.GetParentSegmentID(),
		ParentSpanId:             to.GetParentSpanID(),
		ParentService:            to.GetParentService(),
		ParentServiceInstance:    to.GetParentServiceInstance(),
		ParentEndpoint:           to.GetParentEndpoint(),
		NetworkAddressUsedAtPeer: to.GetAddressUsedAtClient(),
	}
}
