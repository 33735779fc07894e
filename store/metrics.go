package store

import (
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	registerer prometheus.Registerer
	seconds    prometheus.Histogram
	writes     prometheus.Histogram
	reopenings prometheus.Counter
	registered []prometheus.Collector

	flushes, nanos, requests atomic.Uint64
}

// Flushes are the flushes to disk since the store was opened that succeeded.
type Flushes struct {
	Count  uint64
	Time   time.Duration // of all of them together
	Writes uint64        // in all of them together
}

// Flushes counts the flushes.
func (s *Store) Flushes() Flushes {
	m := s.metrics
	return Flushes{Count: m.flushes.Load(), Time: time.Duration(m.nanos.Load()), Writes: m.requests.Load()}
}

func newMetrics(r prometheus.Registerer, s *Store) (*metrics, error) {
	m := &metrics{
		registerer: r,
		seconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "throughline_store_flush_seconds",
			Help:    "Duration of a flush to disk, from its start until what it holds is durable.",
			Buckets: prometheus.ExponentialBuckets(0.0001, 2, 16),
		}),
		writes: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "throughline_store_flush_writes",
			Help:    "Writes that shared one flush.",
			Buckets: prometheus.ExponentialBuckets(1, 2, 14),
		}),
		reopenings: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "throughline_store_reopenings_total",
			Help: "Times that the store's file was opened anew after a failed flush, and writing went on.",
		}),
	}
	if r == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{
		m.seconds,
		m.writes,
		m.reopenings,
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "throughline_store_failed",
			Help: "1 after a failed flush, until the store's file was opened anew: nothing is written meanwhile.",
		}, func() float64 {
			if s.Err() != nil {
				return 1
			}
			return 0
		}),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "throughline_store_size_bytes",
			Help: "Part of the store's file that has ever been used.",
		}, func() float64 { return float64(s.Size()) }),
	} {
		if err := r.Register(c); err != nil {
			m.unregister()
			return nil, err
		}
		m.registered = append(m.registered, c)
	}
	return m, nil
}

func (m *metrics) unregister() {
	for _, c := range m.registered {
		m.registerer.Unregister(c)
	}
}

func (m *metrics) flushed(d time.Duration, writes int) {
	m.seconds.Observe(d.Seconds())
	m.writes.Observe(float64(writes))
	m.nanos.Add(uint64(max(d, 0)))
	m.requests.Add(uint64(writes))
	m.flushes.Add(1)
}
