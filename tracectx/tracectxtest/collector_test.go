package tracectxtest_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	configv3 "skywalking.apache.org/repo/goapi/collect/agent/configuration/v3"
	commonv3 "skywalking.apache.org/repo/goapi/collect/common/v3"
	agentv3 "skywalking.apache.org/repo/goapi/collect/language/agent/v3"
	logv3 "skywalking.apache.org/repo/goapi/collect/logging/v3"
	managementv3 "skywalking.apache.org/repo/goapi/collect/management/v3"

	"github.com/throughline-mqtt/throughline/tracectx"
	"github.com/throughline-mqtt/throughline/tracectx/tracectxtest"
)

func dial(t *testing.T) (*tracectxtest.Collector, *grpc.ClientConn) {
	t.Helper()
	c, err := tracectxtest.NewCollector()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Stop)
	conn, err := grpc.NewClient(c.Addr(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return c, conn
}

func soon(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func object(id string) *agentv3.SegmentObject {
	return &agentv3.SegmentObject{
		TraceId: "t", TraceSegmentId: id, Service: "s", ServiceInstance: "s@1",
		Spans: []*agentv3.SpanObject{
			{SpanId: 1, ParentSpanId: 0, SpanType: agentv3.SpanType_Exit, OperationName: "out", Peer: "p:1", StartTime: 1000, EndTime: 1500},
			{
				SpanId: 0, ParentSpanId: -1, SpanType: agentv3.SpanType_Entry, SpanLayer: agentv3.SpanLayer_MQ,
				OperationName: "in", StartTime: 1000, EndTime: 2000, IsError: true, ComponentId: 5005,
				Tags: []*commonv3.KeyStringValuePair{{Key: "mq.topic", Value: "a/b"}},
				Logs: []*agentv3.Log{{Time: 1700, Data: []*commonv3.KeyStringValuePair{{Key: "event", Value: "error"}}}},
				Refs: []*agentv3.SegmentReference{{
					RefType: agentv3.RefType_CrossThread, TraceId: "t", ParentTraceSegmentId: "up", ParentSpanId: 3,
					ParentService: "ps", ParentServiceInstance: "pi", ParentEndpoint: "pe", NetworkAddressUsedAtPeer: "pa",
				}},
			},
		},
	}
}

func TestCollectorReceivesSegments(t *testing.T) {
	c, conn := dial(t)
	client := agentv3.NewTraceSegmentReportServiceClient(conn)
	stream, err := client.Collect(soon(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"one", "two", "one"} {
		if err := stream.Send(object(id)); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.Wait(soon(t), func(s []*tracectxtest.Segment) bool { return len(s) == 2 }); err != nil {
		t.Fatalf("before the stream ends: %v", err)
	}
	if _, err := stream.CloseAndRecv(); err != nil {
		t.Fatal(err)
	}
	if _, err := client.CollectInSync(soon(t), &agentv3.SegmentCollection{Segments: []*agentv3.SegmentObject{object("three"), {}}}); err != nil {
		t.Fatal(err)
	}

	got := c.Segments()
	if len(got) != 4 || c.Received() != 5 || got[0].ID != "one" || got[2].ID != "three" {
		t.Fatalf("%d segments of %d received", len(got), c.Received())
	}
	want := &tracectxtest.Segment{
		TraceID: "t", ID: "one", Service: "s", Instance: "s@1",
		Spans: []*tracectxtest.Span{{
			ID: 0, Parent: -1, Kind: tracectxtest.Entry, Layer: tracectx.LayerMQ, Component: 5005,
			Operation: "in", Start: time.UnixMilli(1000), End: time.UnixMilli(2000), Failed: true,
			Tags: []tracectxtest.KeyValue{{Key: "mq.topic", Value: "a/b"}},
			Logs: []tracectxtest.Log{{Time: time.UnixMilli(1700), Data: []tracectxtest.KeyValue{{Key: "event", Value: "error"}}}},
			Refs: []tracectxtest.Ref{{
				Kind: tracectxtest.CrossThread, TraceID: "t", SegmentID: "up", SpanID: 3,
				Service: "ps", Instance: "pi", Endpoint: "pe", Peer: "pa",
			}},
		}, {
			ID: 1, Parent: 0, Kind: tracectxtest.Exit, Operation: "out", Peer: "p:1", Start: time.UnixMilli(1000), End: time.UnixMilli(1500),
		}},
	}
	if diff := cmp.Diff(want, got[0]); diff != "" {
		t.Errorf("segment (-want +got):\n%s", diff)
	}
	if got[0].Span(1) != got[0].Spans[1] || got[0].Span(2) != nil {
		t.Error("Span does not find by id")
	}
	if got[0].Spans[0].Tag("mq.topic") != "a/b" || got[0].Spans[0].Tag("x") != "" {
		t.Error("Tag does not find by key")
	}
}

func TestCollectorKnowsInstances(t *testing.T) {
	c, conn := dial(t)
	client := managementv3.NewManagementServiceClient(conn)
	if _, err := client.KeepAlive(soon(t), &managementv3.InstancePingPkg{Service: "s", ServiceInstance: "i"}); err != nil {
		t.Fatal(err)
	}
	_, err := client.ReportInstanceProperties(soon(t), &managementv3.InstanceProperties{
		Service: "s", ServiceInstance: "i", Properties: []*commonv3.KeyStringValuePair{{Key: "language", Value: "go"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	want := []tracectxtest.Instance{{Service: "s", Name: "i", Properties: map[string]string{"language": "go"}, Heartbeats: 1}}
	if diff := cmp.Diff(want, c.Instances()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestCollectorAcceptsWhateverAgentsCall(t *testing.T) {
	_, conn := dial(t)
	configuration, err := configv3.NewConfigurationDiscoveryServiceClient(conn).
		FetchConfigurations(soon(t), &configv3.ConfigurationSyncRequest{Service: "s"})
	if err != nil || len(configuration.GetCommands()) != 0 {
		t.Errorf("configuration: %v, %v", configuration, err)
	}
	meters, err := agentv3.NewMeterReportServiceClient(conn).CollectBatch(soon(t))
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if err := meters.Send(&agentv3.MeterDataCollection{MeterData: []*agentv3.MeterData{{Service: "s"}}}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := meters.CloseAndRecv(); err != nil {
		t.Errorf("meters: %v", err)
	}
	logs, err := logv3.NewLogReportServiceClient(conn).Collect(soon(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := logs.Send(&logv3.LogData{Service: "s"}); err != nil {
		t.Fatal(err)
	}
	if _, err := logs.CloseAndRecv(); err != nil {
		t.Errorf("logs: %v", err)
	}
}

func TestWaitIsBounded(t *testing.T) {
	c, _ := dial(t)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	err := c.Wait(ctx, func([]*tracectxtest.Segment) bool { return false })
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Wait: %v", err)
	}
}

func TestCollectorTakesOverTheAddress(t *testing.T) {
	c, _ := dial(t)
	if second, err := tracectxtest.ListenCollector(c.Addr()); err == nil {
		second.Stop()
		t.Fatal("two collectors at one address")
	}
	c.Stop()
	second, err := tracectxtest.ListenCollector(c.Addr())
	if err != nil {
		t.Fatal(err)
	}
	second.Stop()
	second.Stop()
}
