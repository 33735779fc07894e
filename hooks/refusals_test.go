package hooks

import (
	"errors"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/throughline-mqtt/throughline/hooks/guard"
)

func TestReleaseIsPaced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		space, quit := make(chan struct{}, 1), make(chan struct{})
		r := newRefusals(slog.New(slog.DiscardHandler), space, newMetrics(nil))
		closed := make(map[*guard.Conn]time.Duration)
		begin := time.Now()
		ended := make(chan struct{})
		go func() {
			r.release(quit, func(c *guard.Conn) { closed[c] = time.Since(begin) })
			close(ended)
		}()
		for range 1000 {
			r.refused(new(guard.Conn), outboxFull, errors.New("full"))
		}
		time.Sleep(time.Hour)
		synctest.Wait()
		if len(closed) != 0 {
			t.Fatalf("%d connections were closed while there was no room", len(closed))
		}
		begin = time.Now()
		space <- struct{}{}
		time.Sleep(grace + 500*releasePause + releasePause/2)
		synctest.Wait()
		if len(closed) != 500 {
			t.Errorf("%d connections were closed half way, want 500", len(closed))
		}

		// Full again: the rest waits for the next tick, which has to wait itself.
		r.refused(new(guard.Conn), outboxFull, errors.New("full"))
		time.Sleep(time.Second)
		synctest.Wait()
		if len(closed) != 500 {
			t.Errorf("%d connections were closed, want 500: there is no room", len(closed))
		}
		space <- struct{}{}
		time.Sleep(settle + time.Minute)
		synctest.Wait()
		if len(closed) != 1001 || testutil.ToFloat64(r.waiting) != 0 || testutil.ToFloat64(r.closed) != 1001 {
			t.Errorf("%d connections were closed, want all 1001", len(closed))
		}
		last := time.Duration(0)
		for _, at := range closed {
			last = max(last, at)
		}
		if last < settle {
			t.Errorf("the second release ended %v after the first began", last)
		}
		close(quit)
		<-ended
	})
}

func TestForgottenConnectionsAreNotClosed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		quit := make(chan struct{})
		r := newRefusals(slog.New(slog.DiscardHandler), nil, newMetrics(nil))
		c := new(guard.Conn)
		r.refused(c, commitTimeout, errors.New("late"))
		r.refused(c, commitTimeout, errors.New("late"))
		if n := testutil.ToFloat64(r.waiting); n != 1 {
			t.Errorf("%v connections wait, want 1", n)
		}
		r.forget(c)
		r.recovered()
		r.recovered() // doesn't block
		go r.release(quit, func(*guard.Conn) { t.Error("a connection that has ended was closed") })
		time.Sleep(time.Hour)
		synctest.Wait()
		close(quit)
		synctest.Wait()
	})
}
