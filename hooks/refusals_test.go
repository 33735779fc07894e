package hooks

import (
	"errors"
	"log/slog"
	"sync/atomic"
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
			r.refused(full(new(guard.Conn), "a"))
		}
		time.Sleep(time.Hour)
		synctest.Wait()
		if len(closed) != 0 {
			t.Fatalf("%d connections were closed while there was no room", len(closed))
		}
		begin = time.Now()
		space <- struct{}{}
		time.Sleep(499*releasePause + releasePause/2)
		synctest.Wait()
		if len(closed) != 500 {
			t.Errorf("%d connections were closed half way, want 500", len(closed))
		}

		// Full again: the rest waits for the next tick, which has to wait itself.
		r.refused(full(new(guard.Conn), "a"))
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

// full is the refusal of a publish that was received now.
func full(c *guard.Conn, owed string) refusal {
	return refusal{conn: c, reason: outboxFull, cause: errors.New("full"), owed: owed, received: time.Now()}
}

// While destination b stays full, and says so all the time, the connections that wait for a are released.
func TestADestinationThatStaysFullKeepsNobodyElseWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		space, quit := make(chan struct{}, 1), make(chan struct{})
		r := newRefusals(slog.New(slog.DiscardHandler), space, newMetrics(nil))
		waitsForB, waitsForBoth := new(guard.Conn), new(guard.Conn)
		released := make(map[*guard.Conn]bool)
		go r.release(quit, func(c *guard.Conn) { released[c] = true })
		go func() {
			for pause(releasePause/2, quit) {
				r.refused(full(nil, "b"))
			}
		}()
		for range 100 {
			r.refused(full(new(guard.Conn), "a"))
		}
		r.refused(full(waitsForB, "b"))
		r.refused(full(waitsForBoth, "a"))
		r.refused(full(waitsForBoth, "b"))
		time.Sleep(time.Second)
		space <- struct{}{}
		time.Sleep(time.Second)
		synctest.Wait()
		delete(released, waitsForB) // may have come before b said again that it is full
		if len(released) != 101 || !released[waitsForBoth] {
			t.Errorf("%d connections were released, want the 101 that wait for a", len(released))
		}
		close(quit)
		synctest.Wait()
	})
}

// What a publish waits for is the destination that refused it, whatever else it owes: while that is full again, nobody who
// waits for it is released in vain.
func TestAPublishWaitsForTheDestinationThatRefusedIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		space, quit := make(chan struct{}, 1), make(chan struct{})
		r := newRefusals(slog.New(slog.DiscardHandler), space, newMetrics(nil))
		released := map[string]int{}
		of := map[*guard.Conn]string{}
		go r.release(quit, func(c *guard.Conn) { released[of[c]]++ })
		refuse := func(n int, owed, by string) {
			for range n {
				f := full(new(guard.Conn), owed)
				f.full = by
				of[f.conn] = by
				r.refused(f)
			}
		}
		refuse(100, "a, b", "a")
		refuse(100, "a, b", "b")
		space <- struct{}{}
		time.Sleep(releasePause / 2)
		synctest.Wait()
		refuse(1, "b", "b") // it was a that has room
		time.Sleep(time.Second)
		synctest.Wait()
		if released["a"] != 100 || released["b"] > 1 {
			t.Errorf("released %v, want the 100 that a refused", released)
		}
		time.Sleep(settle)
		space <- struct{}{}
		time.Sleep(settle)
		synctest.Wait()
		if released["a"] != 100 || released["b"] != 101 {
			t.Errorf("released %v, want all", released)
		}
		close(quit)
		synctest.Wait()
	})
}

// Room came back between a publish's refusal and its being noted: no second tick comes for it.
func TestRefusalThatIsNotedLateIsReleased(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		space, quit := make(chan struct{}, 1), make(chan struct{})
		r := newRefusals(slog.New(slog.DiscardHandler), space, newMetrics(nil))
		var released atomic.Int64
		go r.release(quit, func(*guard.Conn) { released.Add(1) })
		for range 10 {
			r.refused(full(new(guard.Conn), "a"))
		}
		late := full(new(guard.Conn), "a")
		time.Sleep(time.Second)
		space <- struct{}{}
		time.Sleep(3 * releasePause)
		r.refused(late)
		time.Sleep(time.Second)
		synctest.Wait()
		if n := released.Load(); n != 10 {
			t.Errorf("%d connections were released, want all 10 that were noted in time", n)
		}
		time.Sleep(settle)
		synctest.Wait()
		if n := released.Load(); n != 11 {
			t.Errorf("%d connections were released, want the late one too", n)
		}
		close(quit)
		synctest.Wait()
	})
}

func TestForgottenConnectionsAreNotClosed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		quit := make(chan struct{})
		r := newRefusals(slog.New(slog.DiscardHandler), nil, newMetrics(nil))
		c := new(guard.Conn)
		late := refusal{conn: c, reason: commitFailed, cause: errors.New("late"), received: time.Now()}
		r.refused(late)
		r.refused(late)
		if n := testutil.ToFloat64(r.waiting); n != 1 {
			t.Errorf("%v connections wait, want 1", n)
		}
		r.forget(c)
		r.releaseAgain()
		r.releaseAgain() // doesn't block
		go r.release(quit, func(*guard.Conn) { t.Error("a connection that has ended was closed") })
		time.Sleep(time.Hour)
		synctest.Wait()
		close(quit)
		synctest.Wait()
	})
}
