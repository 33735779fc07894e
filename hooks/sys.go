package hooks

import (
	"runtime"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/mochi-mqtt/server/v2/packets"
)

// sysInterval is how often $SYS topics are published. The metrics are what ops look at.
const sysInterval = time.Minute

// publishSys publishes $SYS topics, at once and then every sysInterval, until the server closes.
func (s *Server) publishSys() {
	ticker := time.NewTicker(sysInterval)
	defer ticker.Stop()
	for {
		s.publishSysOnce()
		select {
		case <-ticker.C:
		case <-s.quit:
			return
		}
	}
}

// publishSysOnce publishes what mochi would, under the same names.
func (s *Server) publishSysOnce() {
	defer func() {
		if cause := recover(); cause != nil {
			s.hook.panicked("publishSys", nil, cause)
		}
	}()
	now := time.Now()
	var mem runtime.MemStats
	runtime.ReadMemStats(&mem)
	atomic.StoreInt64(&s.mochi.Info.Retained, int64(s.hook.retained.Len()))
	info := s.mochi.Info.Clone()
	total := int64(s.mochi.Clients.Len())
	publish := func(topic, value string) {
		s.hook.deliver("", &packets.Packet{
			FixedHeader: packets.FixedHeader{Type: packets.Publish, Retain: true},
			TopicName:   "$SYS/broker/" + topic,
			Payload:     []byte(value),
		}, now)
	}
	publish("version", "throughline "+s.hook.o.Version)
	for topic, value := range map[string]int64{
		"time":                 now.Unix(),
		"uptime":               now.Unix() - info.Started,
		"started":              info.Started,
		"load/bytes/received":  info.BytesReceived,
		"load/bytes/sent":      info.BytesSent,
		"clients/connected":    info.ClientsConnected,
		"clients/disconnected": total - info.ClientsConnected,
		"clients/maximum":      info.ClientsMaximum,
		"clients/total":        total,
		"packets/received":     info.PacketsReceived,
		"packets/sent":         info.PacketsSent,
		"messages/received":    info.MessagesReceived,
		"messages/sent":        info.MessagesSent,
		"messages/dropped":     int64(s.hook.subscribers.counters.Dropped()),
		"messages/inflight":    info.Inflight,
		"retained":             info.Retained,
		"subscriptions":        info.Subscriptions,
		"system/memory":        int64(mem.HeapInuse),
		"system/threads":       int64(runtime.NumGoroutine()),
	} {
		publish(topic, strconv.FormatInt(value, 10))
	}
}
