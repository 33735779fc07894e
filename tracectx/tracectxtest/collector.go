package tracectxtest

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"
	commonv3 "skywalking.apache.org/repo/goapi/collect/common/v3"
	agentv3 "skywalking.apache.org/repo/goapi/collect/language/agent/v3"
	managementv3 "skywalking.apache.org/repo/goapi/collect/management/v3"

	"github.com/throughline-mqtt/throughline/tracectx"
)

// Collector receives segments, instance properties and heartbeats over SkyWalking's
// native gRPC protocol and keeps them in memory. Whatever else agents call (meters,
// logs, dynamic configuration and so on) is accepted and ignored.
type Collector struct {
	addr   string
	server *grpc.Server
	served chan struct{} // closed when the server's accept loop ended

	mu        sync.Mutex
	changed   chan struct{} // closed and replaced when a segment comes
	segments  []*Segment
	index     map[string]int // segment id -> place in segments
	received  int
	instances map[instanceKey]*Instance
}

// Instance is a service instance that introduced itself or sent a heartbeat.
type Instance struct {
	Service, Name string
	Properties    map[string]string
	Heartbeats    int
}

type instanceKey struct{ service, name string }

// NewCollector starts a Collector on a free port of the loopback interface.
func NewCollector() (*Collector, error) { return ListenCollector("127.0.0.1:0") }

// ListenCollector starts a Collector at addr, for instance where another was
// stopped. The options are for TLS and interceptors.
func ListenCollector(addr string, options ...grpc.ServerOption) (*Collector, error) {
	var listen net.ListenConfig
	l, err := listen.Listen(context.Background(), "tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("listen for trace segments: %w", err)
	}
	c := &Collector{
		addr:      l.Addr().String(),
		server:    grpc.NewServer(append(slices.Clone(options), grpc.UnknownServiceHandler(ignore))...),
		served:    make(chan struct{}),
		changed:   make(chan struct{}),
		index:     make(map[string]int),
		instances: make(map[instanceKey]*Instance),
	}
	agentv3.RegisterTraceSegmentReportServiceServer(c.server, segmentService{collector: c})
	managementv3.RegisterManagementServiceServer(c.server, managementService{collector: c})
	go func() {
		defer close(c.served)
		_ = c.server.Serve(l) // ends with Stop, and with nothing to tell
	}()
	return c, nil
}

// Addr returns the host:port that agents report to.
func (c *Collector) Addr() string { return c.addr }

// Stop closes the listener and every connection. What was received stays readable.
func (c *Collector) Stop() {
	c.server.Stop()
	<-c.served
}

// Segments returns what was received, in the order in which it first came. A segment
// that came again is there once, as SkyWalking keeps it.
func (c *Collector) Segments() []*Segment {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.segments)
}

// Received returns how many segments came, with those that came again.
func (c *Collector) Received() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.received
}

// Instances returns the instances that introduced themselves or sent a heartbeat, by
// service and name.
func (c *Collector) Instances() []Instance {
	c.mu.Lock()
	defer c.mu.Unlock()
	var all []Instance
	for _, in := range c.instances {
		copied := *in
		copied.Properties = maps.Clone(in.Properties)
		all = append(all, copied)
	}
	slices.SortFunc(all, func(a, b Instance) int {
		return cmp.Or(cmp.Compare(a.Service, b.Service), cmp.Compare(a.Name, b.Name))
	})
	return all
}

// Wait blocks until enough says yes to the segments received so far, or ctx ends,
// whose error it then returns. enough is asked at once and after each segment.
func (c *Collector) Wait(ctx context.Context, enough func([]*Segment) bool) error {
	for {
		c.mu.Lock()
		segments, changed := slices.Clone(c.segments), c.changed
		c.mu.Unlock()
		if enough(segments) {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("wait for trace segments, %d so far: %w", len(segments), ctx.Err())
		}
	}
}

func (c *Collector) add(o *agentv3.SegmentObject) {
	s := segmentOf(o)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.received++
	if at, again := c.index[s.ID]; again {
		c.segments[at] = s
	} else {
		c.index[s.ID] = len(c.segments)
		c.segments = append(c.segments, s)
	}
	close(c.changed)
	c.changed = make(chan struct{})
}

// instance returns the instance, new if need be; the lock is held.
func (c *Collector) instance(service, name string) *Instance {
	key := instanceKey{service, name}
	if c.instances[key] == nil {
		c.instances[key] = &Instance{Service: service, Name: name}
	}
	return c.instances[key]
}

type segmentService struct {
	agentv3.UnimplementedTraceSegmentReportServiceServer
	collector *Collector
}

func (s segmentService) Collect(stream agentv3.TraceSegmentReportService_CollectServer) error {
	for {
		o, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return stream.SendAndClose(&commonv3.Commands{})
		}
		if err != nil {
			return err
		}
		s.collector.add(o)
	}
}

func (s segmentService) CollectInSync(_ context.Context, all *agentv3.SegmentCollection) (*commonv3.Commands, error) {
	for _, o := range all.GetSegments() {
		s.collector.add(o)
	}
	return &commonv3.Commands{}, nil
}

type managementService struct {
	managementv3.UnimplementedManagementServiceServer
	collector *Collector
}

func (s managementService) ReportInstanceProperties(_ context.Context, p *managementv3.InstanceProperties) (*commonv3.Commands, error) {
	properties := make(map[string]string)
	for _, kv := range p.GetProperties() {
		properties[kv.GetKey()] = kv.GetValue()
	}
	s.collector.mu.Lock()
	defer s.collector.mu.Unlock()
	s.collector.instance(p.GetService(), p.GetServiceInstance()).Properties = properties
	return &commonv3.Commands{}, nil
}

func (s managementService) KeepAlive(_ context.Context, p *managementv3.InstancePingPkg) (*commonv3.Commands, error) {
	s.collector.mu.Lock()
	defer s.collector.mu.Unlock()
	s.collector.instance(p.GetService(), p.GetServiceInstance()).Heartbeats++
	return &commonv3.Commands{}, nil
}

// ignore answers any other call, unary or streamed, with an empty message once the
// caller is done; every answer of SkyWalking's protocol may be empty.
func ignore(_ any, stream grpc.ServerStream) error {
	for {
		err := stream.RecvMsg(&emptypb.Empty{}) // its fields are kept as unknown ones
		if errors.Is(err, io.EOF) {
			return stream.SendMsg(&emptypb.Empty{})
		}
		if err != nil {
			return err
		}
	}
}

func segmentOf(o *agentv3.SegmentObject) *Segment {
	s := &Segment{
		TraceID:  o.GetTraceId(),
		ID:       o.GetTraceSegmentId(),
		Service:  o.GetService(),
		Instance: o.GetServiceInstance(),
	}
	for _, so := range o.GetSpans() {
		sp := &Span{
			ID:        so.GetSpanId(),
			Parent:    so.GetParentSpanId(),
			Kind:      Kind(so.GetSpanType().String()),
			Operation: so.GetOperationName(),
			Peer:      so.GetPeer(),
			Layer:     tracectx.Layer(so.GetSpanLayer()),
			Component: so.GetComponentId(),
			Start:     time.UnixMilli(so.GetStartTime()),
			End:       time.UnixMilli(so.GetEndTime()),
			Failed:    so.GetIsError(),
			Tags:      keyValues(so.GetTags()),
		}
		for _, l := range so.GetLogs() {
			sp.Logs = append(sp.Logs, Log{Time: time.UnixMilli(l.GetTime()), Data: keyValues(l.GetData())})
		}
		for _, ref := range so.GetRefs() {
			sp.Refs = append(sp.Refs, Ref{
				Kind:      RefKind(ref.GetRefType().String()),
				TraceID:   ref.GetTraceId(),
				SegmentID: ref.GetParentTraceSegmentId(),
				SpanID:    ref.GetParentSpanId(),
				Service:   ref.GetParentService(),
				Instance:  ref.GetParentServiceInstance(),
				Endpoint:  ref.GetParentEndpoint(),
				Peer:      ref.GetNetworkAddressUsedAtPeer(),
			})
		}
		s.Spans = append(s.Spans, sp)
	}
	slices.SortStableFunc(s.Spans, func(a, b *Span) int { return int(a.ID) - int(b.ID) })
	return s
}

func keyValues(pairs []*commonv3.KeyStringValuePair) []KeyValue {
	var all []KeyValue
	for _, kv := range pairs {
		all = append(all, KeyValue{kv.GetKey(), kv.GetValue()})
	}
	return all
}
